"""The reference engine: transformers in fp32 or bf16, on CPU or CUDA. Slow, simple, and independent of vLLM."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from leap_serve import encoding
from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.engine import Completion, Memory, Progress, RequestTiming, Score
from leap_serve.engines import torch_subsets
from leap_serve.engines.torch_cut import load_model
from leap_serve.errors import LeapError, UnsupportedError

if TYPE_CHECKING:
    from leap_serve.measure import Measurement
    from leap_serve.plan import BaseModel, Plan
    from leap_serve.profile import Profile
    from leap_serve.tasks.base import Item
    from leap_serve.workload import Workload

BATCH = 16


class TorchEngine:
    """A transformers causal LM behind the Engine protocol.

    Args:
        model: checkpoint folder, a bundled name, or a model id; a cut may be uneven, but not be tuned and unmerged.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
        device: "cpu" or "cuda"; None takes CUDA where there is one.
        max_model_len: longest sequence in tokens; None takes the model's own.
    """

    name = "torch"

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        device: str | None = None,
        max_model_len: int | None = None,
    ) -> None:
        from transformers import AutoTokenizer

        folder = resolve_model(str(model))
        self.checkpoint = Checkpoint.open(folder)
        _check_merged(self.checkpoint)
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise LeapError("dtype", f"is {dtype!r}", "choose auto, float32, bfloat16 or float16")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model: Any = load_model(self.checkpoint, dtype).to(self.device).eval()
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except (ValueError, OSError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise LeapError(model, f"transformers refuses it ({first[:600]})", "correct the model") from error
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        self.max_model_len: int = max_model_len or self._model.config.get_text_config().max_position_embeddings
        self._cache_bytes = 0
        self._shrunk: torch_subsets.Shrunk | None = None

    @cached_property
    def vocabulary(self) -> list[int]:
        """The token ids that a workload's prompts are drawn from."""
        from leap_serve.workload import vocabulary_of

        return vocabulary_of(self.checkpoint.folder)

    def tokenize(self, texts: Sequence[str], *, prefix: bool = False) -> list[list[int]]:
        """Encode texts without special tokens; with ``prefix`` BOS comes first where the tokenizer puts it."""
        return encoding.encode(self.tokenizer, texts, prefix)

    @torch.inference_mode()  # type: ignore[untyped-decorator, unused-ignore]
    def generate(
        self,
        prompts: Sequence[str],
        max_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int | None = None,
        progress: Progress | None = None,
        each: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Complete each prompt; greedy at temperature 0. A completion ends early where max_model_len is reached."""
        ids = encoding.encode_prompts(self.tokenizer, prompts)
        encoding.check_lengths([len(i) for i in ids], self.max_model_len - 1, "prompt")
        random = torch.Generator(self.device)
        if seed is None:
            random.seed()
        else:
            random.manual_seed(seed)
        ends = set(encoding.end_ids(self.tokenizer)) | set(_listed(self._model.generation_config.eos_token_id))
        done: list[Completion] = []
        for start in range(0, len(ids), BATCH):
            rows = [_Row(self.tokenizer, tuple(stop), ends) for _ in ids[start : start + BATCH]]
            batch = ids[start : start + BATCH]

            def choose(logits: torch.Tensor, rows: list[_Row] = rows) -> torch.Tensor | None:
                tokens = _choose(logits, temperature, random)
                for row, token in zip(rows, tokens.tolist(), strict=True):
                    row.take(token)
                return None if all(row.finished for row in rows) else tokens

            self._decode(batch, min(max_tokens, self.max_model_len - max(map(len, batch))), choose)
            done += [row.completion() for row in rows]
            if each is not None:
                for place in range(start, len(done)):
                    each(place, done[place])
            if progress is not None:
                progress(len(done), len(ids))
        return done

    def score(
        self,
        items: Sequence[Item],
        progress: Progress | None = None,
        each: Callable[[int, Score], None] | None = None,
    ) -> list[Score]:
        """Score each item's answer after its prompt, teacher-forced, followed by the end-of-text token."""
        return self.score_ids(encoding.with_end(self.tokenizer, items), progress, each)

    @torch.inference_mode()  # type: ignore[untyped-decorator, unused-ignore]
    def score_ids(
        self,
        sequences: Sequence[encoding.Encoded],
        progress: Progress | None = None,
        each: Callable[[int, Score], None] | None = None,
    ) -> list[Score]:
        """Score each answer's token ids after the prompt's, as they stand."""
        ids = [e.prompt + e.answer for e in sequences]
        encoding.check_lengths([len(i) for i in ids], self.max_model_len, "item")
        scores: list[Score] = []
        for one, whole in zip(sequences, ids, strict=True):
            tokens = torch.tensor([whole], device=self.device)
            logprobs = self._model(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1)
            first = max(1, len(one.prompt))
            picked = logprobs[first - 1 : -1].gather(1, tokens[0, first:, None])
            scores.append(Score(float(picked.double().sum()), len(whole) - first))
            if each is not None:
                each(len(scores) - 1, scores[-1])
            if progress is not None:
                progress(len(scores), len(ids))
        return scores

    @torch.inference_mode()  # type: ignore[untyped-decorator, unused-ignore]
    def score_plans(
        self, plans: Sequence[Plan], items: Sequence[Item], progress: Progress | None = None, *, esp: bool = False
    ) -> list[list[Score]]:
        """For each plan, the Score of every item when only that plan's experts may be chosen (its top_k, its τ).

        Rows of one batch belong to different plans; each is routed by its own. Full distributions are held
        item by item, [answer tokens, vocabulary].
        """
        self._check_whole("plans")
        self._check_plans(plans)
        encoded = encoding.with_end(self.tokenizer, items)
        ids = [e.prompt + e.answer for e in encoded]
        encoding.check_lengths([len(i) for i in ids], self.max_model_len, "item")
        firsts = [max(1, len(one.prompt)) for one in encoded]
        full: dict[int, torch.Tensor] = {}
        # Item by item, so that most rows of a batch are equally long.
        asked = [(item, plan) for item in range(len(ids)) for plan in range(len(plans))]
        scores: dict[tuple[int, int], Score] = {}
        for start in range(0, len(asked), BATCH):
            batch = asked[start : start + BATCH]
            if esp:
                full = {item: full[item] if item in full else self._answer_logprobs([ids[item]], [firsts[item]])[0]
                        for item in dict.fromkeys(item for item, _ in batch)}  # fmt: skip
            with torch_subsets.masked_routers(self._model, self.checkpoint.family) as routers:
                routers.assign([plans[plan] for _, plan in batch])
                rows = self._answer_logprobs([ids[item] for item, _ in batch], [firsts[item] for item, _ in batch])
            for (item, plan), row in zip(batch, rows, strict=True):
                answer = torch.tensor(ids[item][firsts[item] :], device=self.device)
                logprob = float(row.gather(1, answer[:, None]).double().sum())
                scores[item, plan] = Score(logprob, len(answer), _esp(row, full[item]) if esp else None)
            if progress is not None:
                progress(len(scores), len(asked))
        return [[scores[item, plan] for item in range(len(ids))] for plan in range(len(plans))]

    def apply(self, plan: Plan) -> None:
        """Shrink the layers to a plan until ``restore``: expert tensors hold its rows only, the full ones stay aside."""
        self._check_plans([plan])
        self.restore()
        self._shrunk = torch_subsets.Shrunk(self._model, self.checkpoint.family, plan)

    def restore(self) -> None:
        """Make the layers whole again, bit for bit; harmless when they are."""
        if self._shrunk is not None:
            self._shrunk.restore()
            self._shrunk = None

    def _check_plans(self, plans: Sequence[Plan]) -> None:
        from leap_serve.engines.subsets import check_plans

        check_plans(self.checkpoint, self._identity, plans)

    def _check_whole(self, what: str) -> None:
        if self._shrunk is not None:
            raise UnsupportedError(what, "a plan is applied to the layers", "restore them first")

    @cached_property
    def _identity(self) -> BaseModel:
        return self.checkpoint.identity()

    @torch.inference_mode()  # type: ignore[untyped-decorator, unused-ignore]
    def profile(self, items: Sequence[Item], progress: Progress | None = None, *, channels: bool = False) -> Profile:
        """Collect the experts' statistics over prompt + answer of every item, one item at a time, without padding."""
        from leap_serve.engines.torch_profile import observe
        from leap_serve.profile import assemble, check_request

        check_request(self.checkpoint, items, channels)
        self._check_whole("profile")
        encoded = encoding.encode_items(self.tokenizer, items)
        ids = [e.prompt + e.answer for e in encoded]
        encoding.check_lengths([len(i) for i in ids], self.max_model_len, "item")
        with observe(self._model, self.checkpoint.family, self.checkpoint if channels else None) as layers:
            for number, whole in enumerate(ids, 1):
                self._model(input_ids=torch.tensor([whole], device=self.device), use_cache=False)
                if progress is not None:
                    progress(number, len(ids))
        read = {index: layers[index].read() for index in sorted(layers)}
        return assemble(read, self.checkpoint, items, engine=self.name, dtype=self.dtype)

    @torch.inference_mode()  # type: ignore[untyped-decorator, unused-ignore]
    def generate_timed(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[RequestTiming]:
        """Submit all token-id prompts as one batch, decode exactly ``output_tokens`` each, and time every token."""
        encoding.check_lengths([len(i) for i in prompts], self.max_model_len - output_tokens, "prompt")
        times: list[float] = []
        started = time.perf_counter()

        def choose(logits: torch.Tensor) -> torch.Tensor:
            tokens = logits.argmax(-1)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
            return tokens

        self._decode(prompts, output_tokens, choose)
        return [RequestTiming(tuple(times)) for _ in prompts]

    def measure(self, workload: Workload, rounds: int = 5, warmup: int = 1) -> Measurement:
        """Run a workload in the state the engine is in, full or under an applied plan (see leap_serve.measure)."""
        from leap_serve.measure import measure

        return measure(self, workload, rounds, warmup)

    def memory(self) -> Memory:
        """Report parameters, the KV cache of the last batch, and peak memory, in bytes."""
        weights = sum(p.numel() * p.element_size() for p in self._model.parameters())
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return Memory(weights, self._cache_bytes, peak)

    def close(self) -> None:
        """Free the model."""
        self._model = self._shrunk = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _answer_logprobs(self, rows: Sequence[Sequence[int]], firsts: Sequence[int]) -> list[torch.Tensor]:
        """Return of each row the log-probabilities [A, V] before its tokens from ``first`` on; one batch, padded at the end."""
        longest = max(map(len, rows))
        ids = torch.zeros(len(rows), longest, dtype=torch.long, device=self.device)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(list(row), device=self.device)
            mask[number, : len(row)] = 1
        logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return [
            logits[number, first - 1 : len(row) - 1].float().log_softmax(-1)
            for number, (row, first) in enumerate(zip(rows, firsts, strict=True))
        ]

    def _decode(
        self, prompts: Sequence[Sequence[int]], steps: int, choose: Callable[[torch.Tensor], torch.Tensor | None]
    ) -> None:
        """Decode up to ``steps`` tokens; ``choose`` turns logits [B, V] into tokens [B], or None to end."""
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=self.device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(list(prompt), device=self.device)
            mask[row, longest - len(prompt) :] = 1
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        cache: Any = None
        for _ in range(steps):
            out = self._model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                logits_to_keep=1,
            )  # fmt: skip
            cache = out.past_key_values
            tokens = choose(out.logits[:, -1].float())
            if tokens is None:
                break
            ids = tokens[:, None]
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            positions = positions[:, -1:] + 1
        self._cache_bytes = sum(t.numel() * t.element_size() for at in cache.layers for t in (at.keys, at.values))


class _Row:
    """One sequence that is being generated."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...], ends: set[int]) -> None:
        self.tokenizer, self.stop, self.ends = tokenizer, stop, ends
        self.tokens: list[int] = []
        self.text, self.finished = "", False

    def take(self, token: int) -> None:
        """Append a token unless the sequence has ended; cut the text at the first stop string."""
        if self.finished:
            return
        self.tokens.append(token)
        self.text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        found = [place for place in map(self.text.find, self.stop) if place >= 0]
        if found:
            self.text = self.text[: min(found)]
        self.finished = token in self.ends or bool(found)

    def completion(self) -> Completion:
        """Return what was generated."""
        return Completion(self.text, tuple(self.tokens), "stop" if self.finished else "length")


def _esp(ours: torch.Tensor, full: torch.Tensor) -> float:
    """Mean over A of Σ_v min(p, q) of log-probabilities [A, V]; an answer without a token loses nothing."""
    return float(torch.minimum(ours, full).exp().sum(-1).double().mean()) if len(ours) else 1.0


def _choose(logits: torch.Tensor, temperature: float, random: torch.Generator) -> torch.Tensor:
    """Pick the next token of each row of [B, V]."""
    if temperature == 0.0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=random)[:, 0]


def _listed(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _check_merged(checkpoint: Checkpoint) -> None:
    """Refuse a cut whose router head or adapter lies beside the weights, for transformers would leave them out."""
    if checkpoint.overlays:
        raise UnsupportedError(
            checkpoint.folder, "has tuned parts beside its weights, which transformers does not merge",
            "use --engine vllm, or export it first with leap export",
        )  # fmt: skip
