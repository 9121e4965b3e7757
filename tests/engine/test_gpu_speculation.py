"""Every way to draft on a GPU: the answers are those of the plain engine, captured steps and passes run
them, and start-up has prepared all that they need, kernels and memory.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo import LLM, SamplingParams
from octavo.engine.cuda_graph import StepGraphs
from octavo.kernels.step.plan_format import Plan
from octavo.outputs import RequestOutput
from tests.engine import gpu_models

pytestmark = pytest.mark.gpu

METHODS: dict[str, dict[str, Any]] = {
    "ngram": {"prompt_lookup_min": 1, "prompt_lookup_max": 4},
    "suffix": {"prompt_lookup_min": 1, "prompt_lookup_max": 4},
    "draft_model": {},
    "self": {},
}
OPTIONS: dict[str, Any] = {"device": "cuda", "max_num_seqs": 16, "max_num_batched_tokens": 128}
OPTIONS |= {"max_model_len": 640, "kv_cache_memory": 256 << 20}
NEAR_TIE = {"float32": 1e-3, "bfloat16": 0.15}
"""Of two logits of the model in float32: sums in another order, and their rounding, may turn those that
are closer."""
DTYPES = {"ngram": "float32", "suffix": "float32", "draft_model": "float32", "self": "bfloat16"}
"""Few bits run beside 16 alone on a GPU."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=70, ignore_eos=True)


@pytest.fixture(scope="module", params=["Llama", "Gemma3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the target and, in `draft`, a smaller model of the same family and vocabulary."""
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("Llama", tmp_path_factory.mktemp("llama"))


def make(family: str, path: Path) -> Path:
    gpu_models.make(family, 4).save_pretrained(path)
    gpu_models.make(family, 2, intermediate_size=512).save_pretrained(path / "draft")
    return path


def configured(method: str, folder: Path) -> dict[str, Any]:
    """All drafts are verified, whether it pays or not."""
    config = {"method": method, "num_speculative_tokens": 4, "adaptive": False, **METHODS[method]}
    return config | ({"model": str(folder / "draft")} if method == "draft_model" else {})


def prompts() -> list[dict[str, Any]]:
    """Of several lengths; half of each stands there twice, so that text can be looked up."""
    rng = random.Random(1)
    halves = [[rng.randrange(2048) for _ in range(length)] for length in (1, 5, 32, 33, 130, 250)]
    return [{"prompt_token_ids": half * 2} for half in halves]


def seeded() -> list[SamplingParams]:
    """For each prompt."""
    return [
        SamplingParams(temperature=0.8, top_k=50, top_p=0.95, seed=seed, max_tokens=40, ignore_eos=True)
        for seed in range(len(prompts()))
    ]


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, tuple[list[RequestOutput], list[RequestOutput]]]:
    """Greedy and seeded answers without drafts, by dtype."""
    answers = {}
    for dtype in NEAR_TIE:
        with LLM(**OPTIONS, model=str(folder), dtype=dtype) as llm:
            greedy = llm.generate(prompts(), GREEDY, use_tqdm=False)
            answers[dtype] = (greedy, llm.generate(prompts(), seeded(), use_tqdm=False))
    return answers


@pytest.fixture
def runs_captured(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each step or pass of decodes only, whether a captured graph ran it."""
    seen: list[bool] = []
    fits = StepGraphs.fits

    def noted(self: StepGraphs, plan: Plan) -> bool:
        found = fits(self, plan)
        if not plan.num_prefills:
            seen.append(found)
        return found

    monkeypatch.setattr(StepGraphs, "fits", noted)
    return seen


def check_against(folder: Path, expected: list[RequestOutput], found: list[RequestOutput], near_tie: float) -> None:
    """Token for token the same, up to a place where the two best logits nearly tie."""
    model: torch.nn.Module | None = None
    for wanted, got in zip(expected, found, strict=True):
        for one, other in zip(wanted.outputs, got.outputs, strict=True):
            same = [a == b for a, b in zip(one.token_ids, other.token_ids, strict=True)]
            if all(same):
                continue
            place = same.index(False)
            if model is None:
                transformers = pytest.importorskip("transformers")
                model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda().eval()
            ids = torch.tensor([wanted.prompt_token_ids + one.token_ids[:place]], device="cuda")
            with torch.inference_mode():
                logits = model(ids).logits[0, -1]
            gap = float((logits[one.token_ids[place]] - logits[other.token_ids[place]]).abs())
            assert gap < near_tie, f"token {place} after {len(wanted.prompt_token_ids)}: logits {gap} apart"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("enforce_eager", [False, True], ids=["graphs", "launched"])
def test_answers_are_those_without_drafts(
    folder: Path,
    plain: dict[str, tuple[list[RequestOutput], list[RequestOutput]]],
    method: str,
    enforce_eager: bool,
    runs_captured: list[bool],
) -> None:
    dtype = DTYPES[method]
    options = OPTIONS | {"model": str(folder), "dtype": dtype, "enforce_eager": enforce_eager}
    with LLM(**options, speculative_config=configured(method, folder)) as llm:
        runs_captured.clear()
        cold = llm.generate(prompts(), GREEDY, use_tqdm=False)
        warm = llm.generate(prompts(), GREEDY, use_tqdm=False)  # prompts are found in the prefix cache
        draws = llm.generate(prompts(), seeded(), use_tqdm=False)
        stats = llm.core.stats()
        llm.core.check_integrity()
    assert stats["spec_decode_num_draft_tokens"] > 100
    assert (stats["spec_decode_num_draft_passes"] > 0) == (method in ("draft_model", "self"))
    assert runs_captured and set(runs_captured) == {not enforce_eager}
    greedy, seeded_draws = plain[dtype]
    check_against(folder, greedy, cold, NEAR_TIE[dtype])
    check_against(folder, greedy, warm, NEAR_TIE[dtype])
    if dtype == "float32":
        # A draw may sit on a border that rounding moves between batch shapes; in 16 bits many do.
        pairs = zip(seeded_draws, draws, strict=True)
        same = [one.outputs[0].token_ids == other.outputs[0].token_ids for one, other in pairs]
        assert sum(same) >= len(same) - 1


def test_a_model_that_drafts_for_itself_is_right(folder: Path) -> None:
    """What its target has computed, in prompts, accepted drafts and cached blocks, it has followed."""
    config = {"method": "draft_model", "model": str(folder), "num_speculative_tokens": 4, "adaptive": False}
    with LLM(**OPTIONS, model=str(folder), dtype="float32", speculative_config=config) as llm:
        for _ in range(2):
            llm.generate(prompts(), GREEDY, use_tqdm=False)
        stats = llm.core.stats()
    # With two steps in flight, a request's last drafts may stand behind its end.
    ends = 4 * 2 * len(prompts())
    assert stats["spec_decode_num_accepted_tokens"] >= 0.95 * (stats["spec_decode_num_draft_tokens"] - ends)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_compiled_while_requests_run(llama: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    options = OPTIONS | {"max_num_seqs": 64, "max_num_batched_tokens": 512}
    with LLM(str(llama), dtype="bfloat16", **options, speculative_config=configured(method, llama)) as llm:
        compiled: list[str] = []
        monkeypatch.setattr(
            triton.knobs.runtime, "jit_cache_hook", lambda **call: compiled.append(call["repr"]) or None
        )
        rng = random.Random(3)
        for count in (1, 3, 16, 17, 40):
            asked = [
                {"prompt_token_ids": [rng.randrange(2048) for _ in range(rng.randrange(1, 150))] * 2}
                for _ in range(count)
            ]
            params = [gpu_models.various(rng, 30) for _ in range(count)]
            llm.generate(asked, params, use_tqdm=False)
        assert llm.core.stats()["spec_decode_num_draft_tokens"] > 0
    assert compiled == []


@pytest.mark.parametrize("method", ["draft_model", "self"])
def test_memory_stays_within_its_share(llama: Path, method: str) -> None:
    """The rehearsed worst step has the passes of a model that drafts, and its weights and pages."""
    share, total = 0.15, torch.cuda.get_device_properties(0).total_memory
    with LLM(
        str(llama),
        dtype="bfloat16",
        device="cuda",
        max_num_seqs=64,
        gpu_memory_utilization=share,
        speculative_config=configured(method, llama),
    ) as llm:
        torch.cuda.reset_peak_memory_stats()
        rng = random.Random(4)
        asked = [{"prompt_token_ids": [rng.randrange(2048) for _ in range(350)] * 2} for _ in range(100)]
        params = SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1, logprobs=3, max_tokens=20)
        llm.generate(asked, params, use_tqdm=False)
        assert llm.core.stats()["spec_decode_num_draft_tokens"] > 0
    assert torch.cuda.max_memory_allocated() < share * total
