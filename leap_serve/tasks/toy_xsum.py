"""toy-xsum: one-line summaries of short news texts, scored as XSum is (ROUGE-L F1)."""

from __future__ import annotations

import random
from collections.abc import Iterator

from leap_serve.tasks.base import Item, Split, take
from leap_serve.tasks.xsum import Summaries

CITIES = (
    "Athens", "Berlin", "Cairo", "Dublin", "Geneva", "Hamburg", "Jakarta", "Lima", "London", "Madrid", "Milan",
    "Nairobi", "Oslo", "Paris", "Prague", "Quito", "Rome", "Seoul", "Sydney", "Tokyo", "Vienna", "Warsaw",
)  # fmt: skip
PEOPLE = (
    "Adams", "Baker", "Clark", "Diaz", "Evans", "Fischer", "Garcia", "Hughes", "Ivanov", "Jones", "Keller",
    "Lopez", "Meyer", "Novak", "Owens", "Patel", "Rossi", "Silva", "Turner", "Weber",
)  # fmt: skip
FIRMS = ("Alfa", "Borealis", "Cobalt", "Delta", "Ember", "Falcon", "Granite", "Helix", "Indigo", "Juniper")
PLACES = ("school", "hotel", "museum", "station", "factory", "market", "library", "theatre", "hospital", "harbour")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
WEATHER = ("storm", "flood", "heatwave", "blizzard", "gale")
FILLERS = (
    "Officials said they would give more details soon.", "Local people said they were surprised.",
    "A spokesman declined to comment.", "Reporters were at the scene.", "More news is expected next week.",
    "The mayor thanked everyone for their help.", "It was the second such event this year.",
    "Witnesses spoke of a long day.", "An inquiry has been opened.",
)  # fmt: skip


def _story(rng: random.Random) -> tuple[list[str], str]:
    """Draw the sentences that matter and the summary that they support."""
    city, place, day = rng.choice(CITIES), rng.choice(PLACES), rng.choice(DAYS)
    who, other = rng.sample(PEOPLE, 2)
    firm, rival = rng.sample(FIRMS, 2)
    n, m, weather = rng.randint(2, 99), rng.randint(2, 9), rng.choice(WEATHER)
    kind = rng.randrange(7)
    if kind == 0:
        facts = [
            f"A fire broke out at a {place} on {day}.",
            f"The building in {city} burned for {m} hours.",
            f"{n} people were taken to hospital.",
        ]
        return facts, f"A fire at a {place} in {city} has injured {n} people."
    if kind == 1:
        facts = [
            f"{firm} announced its plans on {day}.",
            f"The company will open a new office in {city}.",
            f"About {n} jobs will be created.",
        ]
        return facts, f"{firm} is to create {n} jobs in {city}."
    if kind == 2:
        facts = [
            f"The {weather} reached {city} on {day}.",
            f"Roads were closed for {m} days.",
            f"The {place} lost its roof.",
        ]
        return facts, f"A {weather} has closed roads and damaged a {place} in {city}."
    if kind == 3:
        facts = [
            f"{who} won the vote on {day}.",
            f"The new mayor of {city} got {n} percent.",
            f"The other candidate was {other}.",
        ]
        return facts, f"{who} has beaten {other} to become mayor of {city}."
    if kind == 4:
        facts = [
            f"{firm} and {rival} met in {city}.",
            f"On {day} {rival} accepted an offer of {n} million.",
            "The deal needs approval.",
        ]
        return facts, f"{firm} is to buy {rival} for {n} million."
    if kind == 5:
        facts = [
            f"Paintings were taken from a {place} in {city}.",
            f"Police arrested {who} on {day}.",
            f"They found {m} of the paintings.",
        ]
        return facts, f"{who} has been arrested over stolen paintings in {city}."
    facts = [f"{who} played for {city} on {day}.", f"The team won by {m} goals.", f"{other} was sent off."]
    return facts, f"{city} won by {m} goals after {other} was sent off."


def generate(rng: random.Random) -> Iterator[Item]:
    """Yield short texts (three facts in order, one or two fillers between) with their summaries, without end."""
    while True:
        facts, summary = _story(rng)
        for filler in rng.sample(FILLERS, rng.randint(1, 2)):
            facts.insert(rng.randint(1, len(facts)), filler)
        document = " ".join(facts)
        yield Item(
            id=f"toy-xsum/{document}",
            prompt=f"Document: {document}\nSummary:",
            answer=f" {summary}",
            reference={"summary": summary, "document": document},
        )


class ToyXsum(Summaries):
    """One-line summaries; ROUGE-L F1 with stemming."""

    name = "toy-xsum"
    max_tokens = 32

    def items(self, split: Split, limit: int | None = None, seed: int = 0) -> list[Item]:
        """Return ``limit`` (default 500) distinct texts of a split."""
        return take(generate(random.Random(f"{self.name}/{split}/{seed}")), split, 500 if limit is None else limit)
