"""Models put to the test: tasks scored, bounds kept off-domain, answers on record, whoever serves them."""
