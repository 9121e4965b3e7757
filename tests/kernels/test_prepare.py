"""`prepare` against docs/plan.md's rules, written out token by token in plain Python."""

import dataclasses

import pytest
import torch
from tests.kernels.plan_bytes import PENALTIES, PREFILL, SAMPLE, Enter, Row, write_plan
from torch import Tensor

from octavo.engine import step_ops
from octavo.engine.step_buffers import DeviceState, StepBuffers, StepInputs
from octavo.kernels.reference import step
from octavo.kernels.step.plan_format import Plan

BLOCK_SIZE, MAX_BLOCKS, SLOTS, VOCAB = 4, 8, 6, 50
PADDING_SLOT = SLOTS - 1


@pytest.fixture(params=["twin", "rust", "triton"])
def prepare(request, device):
    if request.param == "twin":
        return step.prepare
    if request.param == "rust":
        if device != "cpu":
            pytest.skip("Rust's is the CPU's")
        return step_ops.prepare
    return pytest.importorskip("octavo.kernels.step.prepare").prepare


@pytest.fixture
def state(device) -> DeviceState:
    return DeviceState(
        max_num_seqs=SLOTS - 1, num_groups=2, max_blocks=MAX_BLOCKS, vocab_size=VOCAB, device=torch.device(device)
    )


@pytest.fixture
def inputs(device) -> StepInputs:
    inputs = StepInputs(max_tokens=64, max_rows=8, num_groups=2, device=torch.device(device))
    for tensor in vars(inputs).values():
        for one in tensor if isinstance(tensor, list) else [tensor]:
            one.fill_(-77)  # what is not written must be seen
    return inputs


def expect(inputs: StepInputs, state: DeviceState, rows: list[Row], padding_tokens: int = 1) -> None:
    """`rows` in order, decodes first (padding has `padding_tokens` each); compares every derived
    tensor with the rules applied one token at a time.
    """
    token = logits_row = 0
    computed, last, tables = state.computed_len.tolist(), state.last_token.tolist(), state.block_table.tolist()
    for index, row in enumerate(rows):
        prefill = bool(row.flags & PREFILL) or bool(row.tokens)
        padding = not prefill and row.slot == PADDING_SLOT
        length = len(row.tokens) if prefill else padding_tokens if padding else 1 + len(row.drafts)
        assert inputs.row_slots[index] == row.slot
        assert inputs.query_start_loc[index] == token
        assert inputs.seq_lens[index] == (0 if padding else computed[row.slot] + length)
        for place in range(length):
            ids = row.tokens if prefill else [last[row.slot], *row.drafts]
            position = computed[row.slot] + place
            used = place < len(ids) and position < MAX_BLOCKS * BLOCK_SIZE
            if not used:
                position = 0
            assert inputs.token_ids[token] == (ids[place] if used else 0), (index, place)
            assert inputs.positions[token] == position, (index, place)
            for group in range(2):
                block = tables[group][row.slot][position // BLOCK_SIZE] if used else 0
                assert inputs.slot_mapping[group][token] == block * BLOCK_SIZE + position % BLOCK_SIZE, (index, place)
            if not prefill or place == length - 1:
                assert inputs.sample_index[logits_row] == token
                assert inputs.sample_rows[logits_row] == index or not any(row.drafts for row in rows)
                logits_row += 1
            token += 1
    assert inputs.query_start_loc[len(rows)] == token
    assert inputs.token_ids[token] == inputs.positions[token] == inputs.slot_mapping[1][token] == -77
    assert inputs.row_slots[len(rows)] == inputs.seq_lens[len(rows)] == inputs.sample_index[logits_row] == -77


def run(prepare, plan_and_bytes: tuple[Plan, Tensor], state: DeviceState, inputs: StepInputs) -> None:
    prepare(*plan_and_bytes, state, inputs, block_size=BLOCK_SIZE)


def test_mixed_step(prepare, state, inputs, device):
    state.last_token.copy_(torch.tensor([11, 12, 13, 14, 15, 0]))
    state.computed_len.copy_(torch.tensor([7, 0, 3, 31, 9, 0]))
    state.block_table.copy_(torch.randint(1, 90, state.block_table.shape))
    state.block_table[:, PADDING_SLOT] = 0
    decodes = [Row(3), Row(0), Row(4)]
    prefills = [Row(1, tokens=[5, 6, 7, 8, 9]), Row(2, flags=SAMPLE | PREFILL, tokens=[44])]
    plan = write_plan(
        decodes,
        prefills,
        enters=[Enter(1, computed_len=6, output_index=2), Enter(2, computed_len=8)],
        blocks=[(0, 1, 1, 31), (0, 1, 2, 32), (1, 1, 1, 33), (1, 2, 2, 34), (0, 4, 2, 35)],
        device=device,
    )
    run(prepare, plan, state, inputs)
    assert state.computed_len.tolist() == [7, 6, 8, 31, 9, 0]
    assert state.output_index.tolist() == [0, 2, 0, 0, 0, 0]
    assert state.block_table[0, 1, 1:3].tolist() == [31, 32]
    assert state.block_table[1, 1, 1] == 33
    assert state.block_table[1, 2, 2] == 34
    assert state.block_table[0, 4, 2] == 35
    expect(inputs, state, decodes + prefills)


def test_padding_rows_write_the_null_block(prepare, state, inputs, device):
    state.computed_len[2] = 5
    state.block_table[:, 2] = 9
    plan = write_plan([Row(2)], padding=3, padding_slot=PADDING_SLOT, device=device)
    run(prepare, plan, state, inputs)
    expect(inputs, state, [Row(2)] + [Row(PADDING_SLOT)] * 3)
    assert inputs.slot_mapping[0][1:4].tolist() == [0, 0, 0]
    assert inputs.seq_lens[:4].tolist() == [6, 0, 0, 0]


def test_rows_of_different_numbers_of_drafts(prepare, state, inputs, device):
    state.last_token.copy_(torch.tensor([11, 12, 13, 14, 15, 0]))
    # Slot 3 stands one token before the end of its block table.
    state.computed_len.copy_(torch.tensor([7, 0, 3, MAX_BLOCKS * BLOCK_SIZE - 2, 0, 0]))
    state.block_table.copy_(torch.randint(1, 90, state.block_table.shape))
    state.block_table[:, PADDING_SLOT] = 0
    decodes = [Row(0, drafts=[21, 22, 23]), Row(1), Row(2, drafts=[31]), Row(3, drafts=[41, 42, 43])]
    plan = write_plan(decodes, device=device)
    run(prepare, plan, state, inputs)
    expect(inputs, state, decodes)


def test_a_padding_row_has_all_missing_tokens(prepare, state, inputs, device):
    """Beside rows with drafts: more tokens than the longest row, than a tile, and than the block
    table has places.
    """
    state.last_token.fill_(9)
    state.computed_len[:2] = torch.tensor([7, 3])
    state.block_table.copy_(torch.randint(1, 90, state.block_table.shape))
    state.block_table[:, PADDING_SLOT] = 0
    state.last_token[PADDING_SLOT] = 0
    decodes, missing = [Row(0), Row(1, drafts=[21, 22])], MAX_BLOCKS * BLOCK_SIZE + 5
    prefills = [Row(2, tokens=[5, 6])]
    plan = write_plan(decodes, prefills, padding=3, padding_slot=PADDING_SLOT, padding_tokens=missing, device=device)
    run(prepare, plan, state, inputs)
    assert inputs.query_start_loc[:7].tolist() == [0, 1, 4, 4 + missing, 4 + missing, 4 + missing, 6 + missing]
    assert inputs.seq_lens[:6].tolist() == [8, 6, 0, 0, 0, 2]
    assert inputs.token_ids[:4].tolist() == [9, 9, 21, 22]
    assert inputs.positions[:4].tolist() == [7, 3, 4, 5]
    padding = slice(4, 4 + missing)
    for tensor in (inputs.token_ids, inputs.positions, *inputs.slot_mapping):
        assert not tensor[padding].any()
    assert inputs.sample_rows[: 5 + missing].tolist() == [0, 1, 1, 1, *[2] * missing, 5]
    assert inputs.sample_index[: 5 + missing].tolist() == [*range(4 + missing), 5 + missing]
    assert inputs.token_ids[4 + missing : 6 + missing].tolist() == [5, 6]


def test_long_prefill_beside_decodes_with_drafts(prepare, device):
    """A row longer than any tile a kernel may use, after rows of three tokens."""
    state = DeviceState(max_num_seqs=3, num_groups=2, max_blocks=900, vocab_size=VOCAB, device=torch.device(device))
    state.block_table.copy_(torch.randint(1, 5000, state.block_table.shape))
    inputs = StepInputs(max_tokens=4096, max_rows=4, num_groups=2, device=torch.device(device))
    state.computed_len.copy_(torch.tensor([5, 6, 0, 0]))
    long = torch.randint(0, VOCAB, (3000,)).tolist()
    decodes, prefills = [Row(0, drafts=[1, 2])], [Row(2, tokens=[3, 4]), Row(1, tokens=long)]
    run(prepare, write_plan(decodes, prefills, device=device), state, inputs)
    assert inputs.token_ids[:3].tolist() == [0, 1, 2]
    assert inputs.token_ids[3:3005].tolist() == [3, 4, *long]
    positions = torch.tensor([5, 6, 7, 0, 1, *range(6, 3006)])
    slots = torch.tensor([0] * 3 + [2] * 2 + [1] * 3000)
    assert torch.equal(inputs.positions[:3005].cpu(), positions)
    for table, mapping in zip(state.block_tables, inputs.slot_mapping, strict=True):
        expected = table.cpu()[slots, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        assert torch.equal(mapping[:3005].cpu(), expected)
    assert inputs.sample_index[:5].tolist() == [0, 1, 2, 4, 3004]


def test_an_enter_carries_every_parameter(prepare, state, inputs, device):
    enter = Enter(3, 8, 2, 0.75, 40, 0.875, 0.0625, 1.25, -0.5, 1.5, seed=(0xFFFFFFFE, 0x80000001), num_logprobs=5)
    run(prepare, write_plan([Row(3)], enters=[enter], device=device), state, inputs)
    for name in [
        "computed_len", "output_index", "temperature", "top_k", "top_p", "min_p", "repetition_penalty",
        "presence_penalty", "frequency_penalty", "num_logprobs",
    ]:  # fmt: skip
        assert getattr(state, name)[3].item() == dataclasses.asdict(enter)[name], name
    assert [word & 0xFFFFFFFF for word in state.seed[3].tolist()] == [0xFFFFFFFE, 0x80000001]
    others = [slot for slot in range(SLOTS) if slot != 3]
    assert not state.records[others].any()


def test_penalty_counts_of_an_entering_slot(prepare, state, inputs, device):
    assert state.penalty_counts is None
    first = Enter(1, penalty_tokens=[(4, 1), (7, 5), (49, 2)])
    run(prepare, write_plan([Row(1, flags=SAMPLE | PENALTIES)], enters=[first], device=device), state, inputs)
    expected = torch.zeros(SLOTS, VOCAB, dtype=torch.int32)
    expected[1, [4, 7, 49]] = torch.tensor([1, 5, 2], dtype=torch.int32)
    assert torch.equal(state.penalty_counts.cpu(), expected)
    second = [Enter(2, penalty_tokens=[(0, 3)]), Enter(1, penalty_tokens=[(5, 1)])]
    run(prepare, write_plan([Row(1), Row(2)], enters=second, device=device), state, inputs)
    expected[1] = 0
    expected[1, 5], expected[2, 0] = 1, 3
    assert torch.equal(state.penalty_counts.cpu(), expected)


def test_buffers_share_memory_with_their_arrays(device):
    buffers = StepBuffers(100, 68, torch.device(device))
    assert buffers.plan_array.shape == (100,)
    assert buffers.result_array.shape == (68,)
    buffers.plan_array[:100] = range(100)
    plan_device = buffers.upload(100)
    assert plan_device[:100].tolist() == list(range(100))
    assert plan_device.view(torch.int32)[1] == int.from_bytes(bytes([4, 5, 6, 7]), "little")
    buffers.result_device[:17] = torch.arange(17, dtype=torch.int32)
    buffers.download(68)
    buffers.wait()
    assert buffers.result_array.view("<i4").tolist() == list(range(17))
