"""Does the net catch? Plants one fault after another into a copy of the core and runs the
simulation until it finds it.

    python tests/simulation/planted_faults.py [--seconds 60] [name ...]

The core's own `check_integrity` is switched off in the copy, so each fault is found from outside:
by the device, the oracle or the recount. A fault that outlives its seconds of a processor, or whose
line is no longer in the file, fails the run; other work on the machine takes nothing from them. The
builds have a target folder of their own: cargo would take the planted crate for the real one in a
shared folder.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Fault(NamedTuple):
    """One slip of the pen: `old` stands once in `file`, and becomes `new`."""

    name: str
    file: str
    old: str
    new: str


FAULTS = [
    Fault(
        "a mean over what the prefix cache left to compute",
        "rust/scheduler/admit.rs",
        "kind: PoolingKind::Mean, .. }) => 1,",
        "kind: PoolingKind::Mean, .. }) => sequence.known_len(),",
    ),
    Fault(
        "a sum of hidden states that goes on after a preemption",
        "rust/scheduler/schedule.rs",
        "begins: !is_mean || pooled.start == 0,",
        "begins: row.enters && sequence.preemptions == 0,",
    ),
    Fault(
        "an embedding read from the record before",
        "rust/scheduler/commit.rs",
        "step.vectors.vector(result, vector as usize)",
        "step.vectors.vector(result, vector.saturating_sub(1) as usize)",
    ),
    Fault(
        "an embedding as long as the token budget's share of its prompt",
        "rust/scheduler/schedule.rs",
        "count: if is_mean { sequence.prompt.len() as u32 } else { 1 },",
        "count: pooled.len() as u32,",
    ),
    Fault(
        "an embedding with NaN in it",
        "rust/scheduler/commit.rs",
        "all(|number| number.is_finite())",
        "all(|number| !number.is_infinite())",
    ),
    Fault(
        "a padded step whose hidden states are wanted",
        "rust/scheduler/padding.rs",
        "|| self.pooled(row).len() > 1)",
        ")",
    ),
    Fault(
        "a prompt's log probabilities told again after a preemption",
        "rust/scheduler/schedule.rs",
        "self.requests[sequence.request].prompt_asked.max(row.start + 1)..end",
        "row.start + 1..end",
    ),
    Fault(
        "a prompt whose log probabilities are wanted begins in the prefix cache",
        "rust/scheduler/admit.rs",
        "_ if is_asked => asked,",
        "_ if is_asked && asked > 1 => asked,",
    ),
    Fault(
        "the log probability of a later chunk's first token is left out",
        "rust/scheduler/schedule.rs",
        "let end = (row.start + row.len + 1).min(sequence.prompt.len() as u32);",
        "let end = (row.start + row.len).min(sequence.prompt.len() as u32);",
    ),
    Fault(
        "a prompt's log probabilities read from the record before",
        "rust/scheduler/commit.rs",
        "(row.targets.record + number) as usize)",
        "(row.targets.record + number).saturating_sub(1) as usize)",
    ),
    Fault(
        "a skipped decrement",
        "rust/block_pool.rs",
        "entry.references -= 1;",
        "entry.references -= u32::from(entry.references != 2);",
    ),
    Fault(
        "a block registered before the step that fills it has completed",
        "rust/scheduler/commit.rs",
        "let known = sequence.computed_len.min(sequence.known_len()) as usize;",
        "let known = sequence.most_len.min(sequence.known_len()) as usize;",
    ),
    Fault(
        "a block registered one token before it is full",
        "rust/scheduler/commit.rs",
        "let known = sequence.computed_len.min(sequence.known_len()) as usize;",
        "let known = (sequence.computed_len + 1).min(sequence.known_len()) as usize;",
    ),
    Fault(
        "a table entry sent one place too far",
        "rust/scheduler/schedule.rs",
        "index: index as u32, block });",
        "index: index as u32 + u32::from(index == 5), block });",
    ),
    Fault(
        "a block handed out before its fence",
        "rust/block_pool.rs",
        "if entry.fence > fenced {",
        "if entry.fence > fenced + 1 {",
    ),
    Fault(
        "a starved head of the queue",
        "rust/scheduler/admit.rs",
        "passed >= HEAD_BYPASS_LIMIT && self",
        "passed >= 100 * HEAD_BYPASS_LIMIT && self",
    ),
    Fault(
        "a window block released one step early",
        "rust/kv_cache.rs",
        "let limit = first_visible(*window, least) as usize / self.block_size;",
        "let limit = (first_visible(*window, least) as usize + usize::from(*window > 0)) / self.block_size;",
    ),
    Fault(
        "a wrong computed length after a preemption",
        "rust/scheduler/schedule.rs",
        "computed_len: row.start,",
        "computed_len: row.start + u32::from(sequence.preemptions > 0 && row.start > 0),",
    ),
    Fault(
        "a wrong output index after a preemption",
        "rust/scheduler/schedule.rs",
        "output_index: sequence.outputs.len() as u32,",
        "output_index: 0,",
    ),
    Fault(
        "a fork without its copy",
        "rust/kv_cache.rs",
        "copies.push((partly_filled, block));",
        "let _ = (partly_filled, &copies);",
    ),
    Fault(
        "a fork that shares the block it will write",
        "rust/kv_cache.rs",
        """                let block = self.allocate();
                table.push(block);
                copies.push((partly_filled, block));""",
        """                self.pool.acquire(partly_filled);
                table.push(partly_filled);
                let _ = &copies;""",
    ),
    Fault(
        "a prefix hit that ignores the cache salt",
        "rust/scheduler/arrive.rs",
        "let root = self.hasher.root(cache_salt);",
        "let root = self.hasher.root(cache_salt.and(None));",
    ),
    Fault(
        "a sliding window one token too short",
        "rust/kv_cache.rs",
        "(position + 1).saturating_sub(window)",
        "(position + 2).saturating_sub(window)",
    ),
    Fault(
        "a prefix hash that leaves out the parent",
        "rust/prefix_cache.rs",
        "hasher.update(&parent.to_le_bytes());",
        "hasher.update(&[0; 16]);",
    ),
    Fault(
        "rejected drafts that stay counted",
        "rust/scheduler/commit.rs",
        "sequence.most_len -= row.len - num_valid;",
        "sequence.most_len -= (row.len - num_valid).saturating_sub(1);",
    ),
    Fault(
        "keys and values of a rejected draft that count as computed",
        "rust/scheduler/commit.rs",
        "sequence.least_len += num_valid - 1;",
        "sequence.least_len += row.len - 1;",
    ),
    Fault(
        "a block registered that a rejected draft fills",
        "rust/scheduler/commit.rs",
        "sequence.computed_len += num_valid;",
        "sequence.computed_len += row.len;",
    ),
    Fault(
        "a token that counts as an accepted draft",
        "rust/scheduler/commit.rs",
        "appended.min(num_valid.saturating_sub(1))",
        "appended.min(num_valid).min(row.num_drafts)",
    ),
    Fault(
        "a draft that is counted twice",
        "rust/scheduler/draft.rs",
        "self.stats.draft_tokens += u64::from(num_drafts);",
        "self.stats.draft_tokens += u64::from(num_drafts + num_accepted);",
    ),
    Fault(
        "blocks of a row without room for its drafts",
        "rust/scheduler/schedule.rs",
        "self.extend(number, start + len);\n                    self.push_row(number, start, len);",
        "self.extend(number, start + if is_prompt { len } else { 1 });\n"
        "                    self.push_row(number, start, len);",
    ),
    Fault(
        "drafts past the longest sequence",
        "rust/scheduler/sequence.rs",
        "{ 0 } else { max_model_len - self.most_len - 1 };",
        "{ 0 } else { max_model_len - self.most_len + 1 };",
    ),
    Fault(
        "drafts of a model for a row under a grammar",
        "rust/scheduler/draft.rs",
        "let unknown = on_device && sequence.traits.has_grammar;",
        "let unknown = on_device && sequence.traits.has_grammar && left > 5;",
    ),
    Fault(
        "tokens of the core's own where a model drafts",
        "rust/speculation/drafter.rs",
        "const MADE_LATER: u32 = 0;",
        "const MADE_LATER: u32 = 1;",
    ),
    Fault(
        "drafts behind a token that is still in flight",
        "rust/scheduler/draft.rs",
        "if !self.in_flight.is_empty() && !on_device {",
        "if self.in_flight.len() > 1 && !on_device {",
    ),
    Fault(
        "a model that drafts and believes that it missed nothing while it rested",
        "rust/scheduler/follow.rs",
        "sequence.unfollowed += if drafts { 0 } else { row.len };",
        "sequence.unfollowed += if prefill { row.len } else { 0 };",
    ),
    Fault(
        "a prompt that a model that drafts has not computed",
        "rust/scheduler/follow.rs",
        "sequence.unfollowed += if drafts { 0 } else { row.len };",
        "sequence.unfollowed += if drafts || sequence.pending > 0 { 0 } else { row.len.min(20) };",
    ),
    Fault(
        "what a prefix hit lacks of the model that drafts is forgotten",
        "rust/scheduler/admit.rs",
        "sequence.unfollowed = len - sequence.num_followed as u32 * self.config.block_size;",
        "sequence.unfollowed = 0;",
    ),
    Fault(
        "what is lacking of it after a preemption is forgotten",
        "rust/scheduler/admit.rs",
        "sequence.unfollowed = len - sequence.num_followed as u32 * self.config.block_size;",
        "sequence.unfollowed = (len - sequence.num_followed as u32 * self.config.block_size)\n"
        "                    * u32::from(sequence.preemptions == 0);",
    ),
    Fault(
        "what a fork lacks of it is forgotten",
        "rust/scheduler/admit.rs",
        "sequence.unfollowed = len.saturating_sub(followed);",
        "sequence.unfollowed = len.saturating_sub(followed.max(len));",
    ),
    Fault(
        "a block that has been followed for whoever had it before",
        "rust/block_pool.rs",
        "block.references = 1;\n        block.is_followed = false;",
        "block.references = 1;",
    ),
    Fault(
        "a block noted as followed that the model that drafts has a hole in",
        "rust/scheduler/follow.rs",
        "sequence.computed_len.checked_sub(row.unfollowed)",
        "sequence.computed_len.checked_sub(row.unfollowed / 2)",
    ),
    Fault(
        "tokens to follow of which a window has let go",
        "rust/kv_cache.rs",
        "first(*window) >= table.first_live())",
        "first(*window) + 1 >= table.first_live())",
    ),
    Fault(
        "a window that lets go what is followed in this step",
        "rust/scheduler/follow.rs",
        "if self.follow_len > 0 {",
        "if self.follow_len > 30 {",
    ),
    Fault(
        "a draft in the step before the last token is followed",
        "rust/scheduler/draft.rs",
        "if sequence.follow_len == sequence.unfollowed {",
        "if sequence.follow_len + 1 >= sequence.unfollowed {",
    ),
    Fault(
        "a stop token that min_tokens should have banned",
        "rust/scheduler/sequence.rs",
        "(self.outputs.len() as u32 + self.pending) < self.traits.min_tokens",
        "(self.outputs.len() as u32 + self.pending + 1) < self.traits.min_tokens",
    ),
    Fault(
        "an aborted request that stays in the queue's count",
        "rust/scheduler/commit.rs",
        "self.batch_left -= usize::from(entry.in_batch);",
        "self.batch_left -= usize::from(entry.in_batch && reason != FinishReason::Abort);",
    ),
    Fault(
        "drafts that come to a neighbour",
        "rust/plan.rs",
        "self.drafts.extend_from_slice(drafts);",
        "drop(self.drafts.splice(0..0, drafts.iter().copied()));",
    ),
    Fault(
        "drafts cut to what a neighbour has",
        "rust/scheduler/sequence.rs",
        "1 + room.min(self.drafts.len() as u32)",
        "1 + room.min(self.drafts.len() as u32).min(2)",
    ),
    Fault(
        "a draft that is not counted among a step's tokens",
        "rust/scheduler/schedule.rs",
        "self.planned.num_decode_tokens += len;",
        "self.planned.num_decode_tokens += len - u32::from(len > 2);",
    ),
    Fault(
        "prompts that begin before the padding of the decode rows",
        "rust/scheduler/schedule.rs",
        "info.num_decode_tokens = info.num_tokens;",
        "info.num_decode_tokens = planned.num_decode_tokens;",
    ),
    Fault(
        "a token over the budget",
        "rust/scheduler/schedule.rs",
        "self.planned.budget -= len;",
        "self.planned.budget -= len - u32::from(len > 3);",
    ),
    Fault(
        "a victim from the middle of those that run",
        "rust/scheduler/schedule.rs",
        'self.running.pop().expect("whoever preempts runs itself")',
        "self.running.remove(self.running.len() / 2)",
    ),
    Fault(
        "one that gave way and comes back in the same step",
        "rust/scheduler/admit.rs",
        "self.planned.admits_before.is_some_and(|limit| order >= limit)",
        "self.planned.admits_before.is_some_and(|limit| order > limit && order < limit)",
    ),
    Fault(
        "drafts that wait for a model that does not follow",
        "rust/scheduler/admit.rs",
        "let follows = self.follows();",
        "let follows = true;",
    ),
    Fault(
        "a long prompt that gets what short ones leave",
        "rust/scheduler/budget.rs",
        "behind.min((tokens - before) / 2)",
        "behind.min(tokens - before)",
    ),
    Fault(
        "a long prompt that waits while any other is computed",
        "rust/scheduler/admit.rs",
        "self.planned.for_short.min(self.planned.budget)",
        "self.planned.budget * u32::from(!self.planned.prefills.is_empty())",
    ),
    Fault(
        "a call whose prompts all stand in the queue",
        "rust/scheduler/arrive.rs",
        "self.next_of_call((first.0..self.next_request).map(RequestId).collect());",
        "(first.0..self.next_request).for_each(|id| self.next_of_call([RequestId(id)].into()));",
    ),
    Fault(
        "a call that is forgotten when the prompt that stands for it is aborted",
        "rust/scheduler/commit.rs",
        "let behind = self.requests.remove(request).behind;",
        "let behind = self.requests.remove(request).behind.into_iter().skip(1).collect();",
    ),
    Fault(
        "an admission that forgets the growth of those that run",
        "rust/scheduler/growth.rs",
        "kv.decode_footprint(self.len + time)",
        "kv.decode_footprint(self.len + 1)",
    ),
    Fault(
        "an admission that takes back blocks before their step is over",
        "rust/scheduler/growth.rs",
        "if self.left + self.delay <= times[point - 1] {",
        "if self.left.saturating_sub(1) <= times[point - 1] {",
    ),
    Fault(
        "a share that waits behind all who came before it",
        "rust/policy/shares.rs",
        "a.total_cmp(b).then(first.cmp(second))",
        "first.cmp(second).then(a.total_cmp(b))",
    ),
    Fault(
        "a share that is not charged for its prompts",
        "rust/policy/shares.rs",
        "self.charge(share, f64::from(tokens) * PROMPT_COST);",
        "self.charge(share, f64::from(tokens.min(0)) * PROMPT_COST);",
    ),
    Fault(
        "a head that those of its own share pass uncounted",
        "rust/scheduler/admit.rs",
        "before.iter().all(|number| queue(number) != queue(&rest[0]))",
        "before.is_empty() && queue(&rest[0]) == 0",
    ),
]


def plant(fault: Fault, copy: Path) -> None:
    """Copies the crate to `copy`, with the fault in it and without the core's own check."""
    for folder in ("rust", "tests/simulation", "benches", "bench"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, copy / folder, dirs_exist_ok=True)
    for file in ("Cargo.toml", "Cargo.lock"):
        shutil.copy(ROOT / file, copy / file)
    replace_once(copy / "tests/simulation/world.rs", "self.core.check_integrity()?;", "")
    replace_once(copy / fault.file, fault.old, fault.new)


def replace_once(path: Path, old: str, new: str) -> None:
    path.write_text(once(path.read_text(), old, path.name).replace(old, new))


def once(text: str, old: str, name: str) -> str:
    """The text again, if `old` stands in it exactly once."""
    if text.count(old) != 1:
        sys.exit(f"{name} has {old!r} {text.count(old)} times, but must have it once: bring the table up to date")
    return text


def find(copy: Path, seconds: int) -> tuple[float, int, str] | None:
    """Builds the copy and runs fresh seeds: (seconds, seeds, what was found), or None."""
    command = [
        "cargo",
        "test",
        "--quiet",
        "--test",
        "simulation",
        "--target-dir",
        str(ROOT / "target" / "planted_faults"),
    ]
    subprocess.run([*command, "--no-run"], cwd=copy, check=True, stderr=subprocess.DEVNULL)
    environment = {**os.environ, "OCTAVO_SIM_SECONDS": str(100 * seconds), "RUST_BACKTRACE": "0"}
    # The limit ends a process by a signal, and holds for each of them: cargo itself uses little.
    command = ["prlimit", f"--cpu={seconds}", *command, "fresh_seeds", "--", "--nocapture"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    elapsed = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    output = run.stdout + run.stderr
    first = re.search(r"fresh seeds from (\d+)", output)
    found = re.search(r"simulation seed (\d+): (.*)", output)
    if first is None or found is None:
        return None
    return elapsed, int(found[1]) - int(first[1]) + 1, found[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="parts of the names of the faults to plant; default: all")
    parser.add_argument("--seconds", type=int, default=60, help="of a processor, for which each may stay unfound")
    arguments = parser.parse_args()
    chosen = [fault for fault in FAULTS if not arguments.names or any(name in fault.name for name in arguments.names)]
    for fault in chosen:  # Before the first build, so that a stale table costs no hour.
        once((ROOT / fault.file).read_text(), fault.old, fault.file)
    missed = []
    print(f"{'planted':64} {'seconds':>7} {'seeds':>6}  found as")
    with tempfile.TemporaryDirectory() as folder:
        for fault in chosen:
            plant(fault, Path(folder))
            found = find(Path(folder), arguments.seconds)
            if found is None:
                missed.append(fault.name)
                print(f"{fault.name:64} {'-':>7} {'-':>6}  NOT FOUND in {arguments.seconds} s", flush=True)
            else:
                print(f"{fault.name:64} {found[0]:7.1f} {found[1]:6}  {found[2][:110]}", flush=True)
    print(f"{len(chosen) - len(missed)} of {len(chosen)} faults found")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
