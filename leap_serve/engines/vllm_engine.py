"""The engine that serves: vLLM, in this process, on CPU or CUDA."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_serve import encoding
from leap_serve.engine import Completion, Memory, Progress, RequestTiming, Score
from leap_serve.engines import vllm_plans, vllm_scores
from leap_serve.errors import LeapError, UnsupportedError

if TYPE_CHECKING:
    from leap_serve.engines.vllm_plans import Subset
    from leap_serve.measure import Measurement
    from leap_serve.plan import BaseModel, Plan
    from leap_serve.profile import Profile
    from leap_serve.tasks.base import Item
    from leap_serve.workload import Workload


class VllmEngine:
    """vLLM behind the Engine protocol. One process, one engine at a time; close() before opening the next.

    Args:
        model: checkpoint folder, a bundled name, or a model id.
        dtype: "auto", "float32", "bfloat16" or "float16".
        max_model_len: longest sequence in tokens; None takes the model's own.
        max_num_seqs: requests that run at once.
        kv_cache_gib: size of the KV cache.
        enforce_eager: no torch.compile and no CUDA graphs; profiling needs it.
        tensor_parallel_size: workers that share the weights.
        load_format: vLLM's; "leap" loads a cut checkpoint with its overlays.
        quiet: only errors are logged.
        vllm_args: any other argument of vllm.LLM.

    Raises LeapError where vLLM refuses the model or an argument.
    """

    name = "vllm"

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        kv_cache_gib: float = 1.0,
        enforce_eager: bool = True,
        tensor_parallel_size: int = 1,
        load_format: str = "auto",
        quiet: bool = True,
        **vllm_args: Any,
    ) -> None:
        from leap_serve.checkpoint import Checkpoint, resolve_model

        self.model = resolve_model(str(model))
        self.checkpoint = Checkpoint.open(self.model)
        self.enforce_eager = enforce_eager
        _prepare_environment(kv_cache_gib, tensor_parallel_size, quiet)
        with _as_leap_errors(model):
            from vllm import LLM

            self._llm: Any = LLM(
                str(self.model),
                dtype=dtype,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs,
                kv_cache_memory_bytes=int(kv_cache_gib * 2**30),
                enforce_eager=enforce_eager,
                tensor_parallel_size=tensor_parallel_size,
                load_format=load_format,
                worker_extension_cls="leap_vllm.worker.LeapWorker",
                # Greedy scores of a prompt must not depend on what was asked before.
                **{"enable_prefix_caching": False, "use_tqdm_on_load": not quiet, **vllm_args},
            )
        self.tokenizer: Any = self._llm.get_tokenizer()
        self.max_model_len: int = self._llm.model_config.max_model_len
        self.dtype = str(self._llm.model_config.dtype).removeprefix("torch.")
        self._requests = 0
        self._identity: BaseModel | None = None
        self._applied = False

    @cached_property
    def vocabulary(self) -> list[int]:
        """The token ids that a workload's prompts are drawn from."""
        from leap_serve.workload import vocabulary_of

        return vocabulary_of(self.checkpoint.folder)

    def tokenize(self, texts: Sequence[str], *, prefix: bool = False) -> list[list[int]]:
        """Encode texts without special tokens; with ``prefix`` BOS comes first where the tokenizer puts it."""
        return encoding.encode(self.tokenizer, texts, prefix)

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
        from vllm import SamplingParams

        ids = encoding.encode_prompts(self.tokenizer, prompts)
        encoding.check_lengths([len(i) for i in ids], self.max_model_len - 1, "prompt")
        params = SamplingParams(
            temperature=temperature, max_tokens=max_tokens, stop=list(stop), seed=seed, skip_special_tokens=True
        )
        one = None if each is None else lambda place, result: each(place, _completion(result))
        return [_completion(result) for result in self._run(ids, params, progress, each=one)]

    def score(
        self,
        items: Sequence[Item],
        progress: Progress | None = None,
        each: Callable[[int, Score], None] | None = None,
    ) -> list[Score]:
        """Score each item's answer after its prompt, teacher-forced, followed by the end-of-text token."""
        return self.score_ids(encoding.with_end(self.tokenizer, items), progress, each)

    def score_ids(
        self,
        sequences: Sequence[encoding.Encoded],
        progress: Progress | None = None,
        each: Callable[[int, Score], None] | None = None,
    ) -> list[Score]:
        """Score each answer's token ids after the prompt's, as they stand."""
        return vllm_scores.score(self, sequences, progress, each=each)[0]

    def score_plans(
        self, plans: Sequence[Plan], items: Sequence[Item], progress: Progress | None = None, *, esp: bool = False
    ) -> list[list[Score]]:
        """For each plan, the Score of every item when only that plan's experts may be chosen (its top_k, its τ).

        Requests of up to 64 plans run in one batch; routers are hooked on first use and stay so until
        ``unhook_plans``. With ``esp`` the workers hold the full model's distributions, at most 256 MiB of them
        at a time (of one item at least). Raises LeapError where a plan does not fit the model, UnsupportedError
        where the routing cannot be taken over (compiled graphs, monolithic kernels, experts spread over ranks).
        """
        ask = vllm_scores.score_plans_esp if esp else vllm_scores.score_plans
        return ask(self, plans, items, progress)

    def load_plans(self, plans: Sequence[Plan]) -> list[Subset]:
        """Put up to 64 plans at the requests' disposal, in place of those before; returns what names each."""
        return vllm_plans.load_plans(self, plans)

    def unhook_plans(self) -> None:
        """Take the hooks off the routers; they come back with the next plans."""
        self._rpc("leap_remove_plans")

    def apply(self, plan: Plan) -> None:
        """Shrink the layers to a plan until ``restore``; what is asked meanwhile is answered by the pruned model.

        The full experts are kept aside: ``memory`` then counts the weights that the pruned model needs,
        the process holds both. Raises as ``score_plans`` does, and for quantised experts.
        """
        vllm_plans.apply(self, plan)

    def restore(self) -> None:
        """Make the layers whole again, bit for bit; harmless when they are."""
        vllm_plans.restore(self)

    def profile(self, items: Sequence[Item], progress: Progress | None = None, *, channels: bool = False) -> Profile:
        """Collect the experts' statistics over prompt + answer of every item, in the kernels that serve.

        Every token of prompt and answer passes the router once; generated tokens do not count. Raises
        UnsupportedError where the engine cannot be observed (compiled graphs, monolithic kernels).
        """
        from vllm import SamplingParams

        from leap_serve.profile import check_request, from_worker

        check_request(self.checkpoint, items, channels)
        if self._applied:
            raise UnsupportedError(
                "profile", "a plan is applied, and profiles are of the full model", "restore it first"
            )
        if not self.enforce_eager:
            raise UnsupportedError("profile", "the engine runs compiled graphs", "open it with enforce_eager=True")
        encoded = encoding.encode_items(self.tokenizer, items)
        ids = [e.prompt + e.answer for e in encoded]
        encoding.check_lengths([len(i) for i in ids], self.max_model_len - 1, "item")
        params = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, skip_reading_prefix_cache=True)
        self._rpc("leap_start_profile", str(self.model) if channels else None)
        try:
            self._run(ids, params, progress)
            collected = self._rpc("leap_read_profile")[0]
        finally:
            self._rpc("leap_stop_profile")
        return from_worker(collected, self.checkpoint, items, engine=self.name, dtype=self.dtype)

    def generate_timed(self, prompts: Sequence[Sequence[int]], output_tokens: int) -> list[RequestTiming]:
        """Submit all token-id prompts at once, decode exactly ``output_tokens`` each, and time every token.

        The clock starts before the first submission, so the first token's time is the TTFT of an
        offline client. Nothing is read from the prefix cache, and the end-of-text token is ignored.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        encoding.check_lengths([len(i) for i in prompts], self.max_model_len - output_tokens, "prompt")
        params = SamplingParams(
            temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA, skip_reading_prefix_cache=True,
        )  # fmt: skip
        engine = self._llm.llm_engine
        times: dict[str, list[float]] = {}
        started = time.perf_counter()
        with self._requests_of(prompts, params) as names:
            times = {name: [] for name in names}
            while engine.has_unfinished_requests():
                outputs = engine.step()
                now = time.perf_counter() - started
                for output in outputs:
                    times[output.request_id] += [now] * len(output.outputs[0].token_ids)
        for name, stamps in times.items():
            assert len(stamps) == output_tokens, f"request {name} gave {len(stamps)} of {output_tokens} tokens"
        return [RequestTiming(tuple(stamps)) for stamps in times.values()]

    def measure(self, workload: Workload, rounds: int = 5, warmup: int = 1) -> Measurement:
        """Run a workload in the state the engine is in, full or under an applied plan (see leap_serve.measure)."""
        from leap_serve.measure import measure

        return measure(self, workload, rounds, warmup)

    def memory(self) -> Memory:
        """Report parameters, KV cache and peak memory in bytes, summed over the workers."""
        workers = self._rpc("leap_memory")
        return Memory(*(sum(worker[key] for worker in workers) for key in ("weights", "kv_cache", "peak")))

    def kernels(self) -> list[dict[str, Any]]:
        """Say which kernel each MoE layer runs, with which measured launches, and why."""
        return list(self._rpc("leap_kernels")[0])

    def close(self) -> None:
        """Free the model; a second engine may then be opened in this process. Harmless when called twice."""
        if self._llm is None:
            return
        import torch

        self._llm.llm_engine.engine_core.shutdown()  # ends the process groups, too
        self._llm = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _rpc(self, method: str, *args: Any) -> list[Any]:
        with _as_leap_errors(self.model):
            return list(self._llm.collective_rpc(method, args=args))

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        params: Any,
        progress: Progress | None,
        subsets: Sequence[Subset | None] | None = None,
        extras: Sequence[Mapping[str, Any]] | None = None,
        each: Callable[[int, Any], None] | None = None,
    ) -> list[Any]:
        """Run token-id prompts to their end, each under its own plan and with its own extra_args; outputs in order."""
        engine = self._llm.llm_engine
        finished: dict[str, Any] = {}
        with self._requests_of(prompts, params, subsets, extras) as names:
            places = {name: place for place, name in enumerate(names)}
            while engine.has_unfinished_requests():
                before = len(finished)
                ended = {output.request_id: output for output in engine.step() if output.finished}
                finished.update(ended)
                if each is not None:
                    for name, output in ended.items():
                        each(places[name], output)
                if progress is not None and len(finished) > before:
                    progress(len(finished), len(names))
        return [finished[name] for name in names]

    @contextlib.contextmanager
    def _requests_of(
        self,
        prompts: Sequence[Sequence[int]],
        params: Any,
        subsets: Sequence[Subset | None] | None = None,
        extras: Sequence[Mapping[str, Any]] | None = None,
    ) -> Iterator[list[str]]:
        """Submit prompts under fresh names; what has not ended when the block is left is aborted."""
        names = [str(self._requests + number) for number in range(len(prompts))]
        self._requests += len(prompts)
        try:
            with _as_leap_errors(self.model):
                for place, (name, ids) in enumerate(zip(names, prompts, strict=True)):
                    prompt: dict[str, Any] = {"prompt_token_ids": list(ids)}
                    own, extra = params.clone(), dict(extras[place]) if extras is not None else {}
                    if subsets is not None and (subset := subsets[place]) is not None:
                        extra["leap_plan"] = subset.slot
                        if subset.salt is not None:
                            prompt["cache_salt"] = subset.salt
                    own.extra_args = extra or None
                    self._llm.llm_engine.add_request(name, prompt, own)
            yield names
        except BaseException:
            self._llm.llm_engine.abort_request(names)
            raise


def _completion(result: Any) -> Completion:
    output = result.outputs[0]
    return Completion(output.text, tuple(output.token_ids), str(output.finish_reason))


def _prepare_environment(kv_cache_gib: float, tensor_parallel_size: int, quiet: bool) -> None:
    """Set what vLLM reads when it is imported or starts."""
    if kv_cache_gib <= 0:
        raise LeapError("kv_cache_gib", f"is {kv_cache_gib}", "give a positive number of GiB")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # On CPU this variable would override the argument, and it knows whole GiB only.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    if tensor_parallel_size > 1:
        # vLLM binds each CPU worker to cores of its own, and refuses when there are too few.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if quiet:
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        logging.getLogger("vllm").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.reduce_op` is deprecated")


_REFUSALS = (ValueError, TypeError, RuntimeError, OSError, MemoryError)


@contextlib.contextmanager
def _as_leap_errors(where: object) -> Iterator[None]:
    """Turn what vLLM raises about its arguments or the model into a LeapError; bugs keep their traceback."""
    try:
        yield
    except LeapError:
        raise
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise UnsupportedError(
            "vllm", "is not installed", "pip install 'leap-serve[cpu]', or 'leap-serve[cuda]' with an NVIDIA GPU"
        ) from None
    except Exception as error:
        # vLLM raises a bare Exception when one of its worker processes cannot start.
        if type(error) is not Exception and not isinstance(error, _REFUSALS):
            raise
        cause: BaseException | None = error
        while cause is not None:
            # The plugin's own message is hidden under vLLM's «engine initialisation failed».
            if isinstance(cause, LeapError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise LeapError(
            where, f"vLLM refuses it ({' '.join(lines[:4])[:600] or type(error).__name__})",
            "correct the model or the argument that it names",
        ) from error  # fmt: skip
