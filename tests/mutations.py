"""Do the tests notice when a promise of docs/design.md is broken? Each is broken in a copy, with its tests run there.

    python -m tests.mutations [--v2]

With --v2 it is the interface to vLLM's V2 model runner that is broken, with engines that run it (`tests.runners`):
slow.
Prints a line for each, and exits with 1 if a broken promise passes.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
ENGINE, API, MASKS = "crane_serve/engine", "crane_serve/service/api", "crane_serve/common/masks"


@dataclass(frozen=True)
class Mutation:
    """A promise, the change that breaks it (`old` to `new`, once), and the tests that must notice."""

    promise: str
    file: str
    old: str
    new: str
    tests: str


MUTATIONS = (
    Mutation(
        "from the Hub only files are fetched whose header says that they are masks",
        f"{MASKS}/hub.py",
        "            listing.require_masks(source)\n            directory",
        "            directory",
        "tests/unit/test_hub_masks.py",
    ),
    Mutation(
        "masks of the Hub stay at their commit while they are served",
        f"{MASKS}/hub.py",
        'return snapshots.name == "snapshots" and',
        "return False and",
        "tests/unit/test_hub_masks.py",
    ),
    Mutation(
        "KV blocks computed under one mask never serve another",
        f"{ENGINE}/prefix_cache.py",
        "    if mask is None or mask.positions not in (Positions.ALL, Positions.PROMPT):\n        return client_salt",
        "    return client_salt",
        "tests/unit/test_prefix_cache.py",
    ),
    Mutation(
        "KV blocks are shared only where the same tokens were masked",
        f"{ENGINE}/prefix_cache.py",
        "self._until, *masked)",
        "self._until)",
        "tests/unit/test_prefix_cache.py",
    ),
    Mutation(
        "a mask that ends with a token ends with one from the prefix cache, too",
        f"{ENGINE}/routing.py",
        "return computed < self._read or (",
        "return computed < self._read and (",
        "tests/unit/test_routing.py",
    ),
    Mutation(
        "a batch that decodes on keeps its slots only where its rows last",
        f"{ENGINE}/batch_masks.py",
        "if (first >= settled).all() else None",
        "",
        "tests/unit/test_routing.py",
    ),
    Mutation(
        "a hit in the prefix cache ends before what is scored",
        f"{ENGINE}/scoring.py",
        "_Shorter(request, asked.first), *map",
        "request, *map",
        "tests/unit/test_scored_rows.py",
    ),
    Mutation(
        "padding behind a batch is unmasked",
        f"{ENGINE}/routing.py",
        "    if used > len(rows):",
        "    if False:",
        "tests/unit/test_routing.py",
    ),
    Mutation(
        "a mask in use keeps its row",
        f"{ENGINE}/table.py",
        "self._free_row(distinct)",
        "1",
        "tests/unit/test_routing.py",
    ),
    Mutation(
        "row 0 is all ones",
        f"{ENGINE}/table.py",
        "            return len(self._rows) + 1",
        "            return len(self._rows)",
        "tests/unit/test_routing.py",
    ),
    Mutation(
        "a request asks for a mask by a misspelt argument: refused",
        f"{ENGINE}/admission.py",
        "        if looks_like_ours(argument) and argument not in (*_ARGUMENTS, SCORE_ARGUMENT, ACTIVATIONS_ARGUMENT):",
        "        if False:",
        "tests/engine/test_support.py",
    ),
    Mutation(
        "the rule of admission is applied with a full table, too",
        f"{ENGINE}/admission.py",
        "    if len(in_use) >= config.rows:",
        "    if False:",
        "tests/unit/test_live_masks.py",
    ),
    Mutation(
        "no token reaches the model that it has no embedding for",
        f"{ENGINE}/vocabulary.py",
        "        if not 0 <= token_id < vocabulary and position",
        "        if token_id < 0 and position",
        "tests/engine/test_unknown_tokens.py",
    ),
    Mutation(
        "a mask belongs to one model",
        f"{MASKS}/library.py",
        "                fingerprint.require(stored.info.fingerprint, f",
        "                (lambda *_: None)(stored.info.fingerprint, f",
        "tests/unit/test_library.py",
    ),
    Mutation(
        "a mask's identity is its content",
        f"{MASKS}/library.py",
        "        if name in self._by_digest and (retired",
        "        if False and (retired",
        "tests/unit/test_library.py",
    ),
    Mutation(
        "no scale of joined masks is beyond the bound",
        f"{MASKS}/composition.py",
        "        if bound > MAX_SCALE:\n            raise ValueError(f\"scales",
        "        if False:\n            raise ValueError(f\"scales",
        "tests/unit/test_composition.py",
    ),
    Mutation(
        "no two contents have one identity",
        f"{MASKS}/composition.py",
        "        if len(self.members) == 1 and not first.factor:",
        "        if len(self.members) == 1:",
        "tests/unit/test_composition.py",
    ),
    Mutation(
        "no two masks in requests have one identity",
        f"{MASKS}/inline.py",
        "        if self.added:\n            content",
        "        if False:\n            content",
        "tests/unit/test_inline.py",
    ),
    Mutation(
        "a request brings its own mask only where this is allowed",
        f"{MASKS}/library.py",
        "        if not self.allows_inline:",
        "        if False:",
        "tests/unit/test_inline.py",
    ),
    Mutation(
        "a mask in the body is multiplied within a bound",
        f"{API}/gate.py",
        "        if carried > MAX_MASK_CHARACTERS:",
        "        if False:",
        "tests/api/test_inline_masks.py",
    ),
    Mutation(
        "a request keeps what its joined mask is made of",
        f"{MASKS}/library.py",
        "            self._lease(resolved, {member.mask.digest for member in mask.members})",
        "            self._lease(resolved, {mask.digest})",
        "tests/unit/test_live_masks.py",
    ),
    Mutation(
        "what a request leaves in its KV blocks never reaches the next",
        f"{ENGINE}/fresh_blocks.py",
        "            config.__class__ = ZeroedKVCacheConfig",
        "            pass",
        "tests/engine/test_fresh_blocks.py",
    ),
    Mutation(
        "a change that fails leaves no content in the engine",
        f"{ENGINE}/mask_changes.py",
        "                        await self._take_back(stored)",
        "                        pass",
        "tests/unit/test_saved_masks.py",
    ),
    Mutation(
        "a change that fails leaves the disk as it was",
        "crane_serve/common/atomic.py",
        "                os.replace(kept, path)",
        "                pass",
        "tests/unit/test_failing_disk.py",
    ),
    Mutation(
        "a mask is not lost on a route of vLLM",
        f"{API}/openai.py",
        "            self._place().update(mask_arguments(self.mask))",
        "            pass",
        "tests/api/test_openai_translation.py",
    ),
    Mutation(
        "a request whose client has gone is aborted",
        f"{API}/request_lifetime.py",
        "        if not self._is_last_given:\n            self.end(None)",
        "        pass",
        "tests/api/test_request_lifetime.py",
    ),
    Mutation(
        "what is admitted is counted until it has ended",
        f"{API}/request_lifetime.py",
        "                self._gate.leave(context)",
        "                pass",
        "tests/api/test_request_lifetime.py",
    ),
    Mutation(
        "only an administrator changes masks",
        f"{API}/authentication.py",
        "    if _needs_admin(scope) and key.role is not Role.ADMIN:",
        "    if False:",
        "tests/api/test_authentication.py",
    ),
    Mutation(
        "no line of the log holds a key",
        f"{API}/observation.py",
        "context.key.name if context.key is not None else None",
        "dict(scope[\"headers\"]).get(b\"x-api-key\", b\"\").decode()",
        "tests/api/test_observation.py",
    ),
    Mutation(
        "an expert's neurons heed their own places of a token's mask",
        f"{ENGINE}/masked_experts.py",
        "* table[rows[tokens[index]], place]",
        "* table[rows[tokens[index]], 0]",
        "tests/unit/test_masked_experts.py",
    ),
    Mutation(
        "a router does not choose what a token's mask keeps it from",
        f"{ENGINE}/masked_experts.py",
        "table[slots[: len(router_logits)]] == 0",
        "table[slots[: len(router_logits)]] < 0",
        "tests/unit/test_masked_experts.py",
    ),
    Mutation(
        "relevance goes through experts, not through their choice",
        "crane_serve/common/models/open_experts.py",
        "routes, weights.detach())",
        "routes, weights)",
        "tests/unit/test_explicit_lrp.py",
    ),
    Mutation(
        "what weights shared experts is a constant under the rules",
        "relevance/rules.py",
        "layer.shared_gate is not None and rules.shares",
        "False",
        "tests/unit/test_explicit_lrp.py",
    ),
    Mutation(
        "scores are given once, also if a request is preempted behind its prompt",
        f"{ENGINE}/runner_v2.py",
        " and input_batch.prefill_len_np[index] <= prompt_lens[input_batch.idx_mapping_np[index]]",
        "",
        "tests/engine/test_runner_v2.py",
    ),
    Mutation(
        "weights of experts are kept also where they are packed into the same memory",
        f"{ENGINE}/masked_experts.py",
        "else held.data.clone() for",
        "else held.data for",
        "tests/unit/test_masked_experts.py",
    ),
)  # fmt: skip

V2, SCHEDULES = f"{ENGINE}/runner_v2.py", "tests/engine/test_schedules.py::test_"
UNDER_V2 = (
    Mutation(
        "a request that comes back after a preemption has its own mask, not that of another",
        V2,
        "= _Request.of(new_req_data)\n",
        "= (\n            _Request.of(new_req_data)\n"
        "            if len(new_req_data.prefill_token_ids) == len(new_req_data.prompt_token_ids)\n"
        "            else next(iter(self._crane_requests.values()), _NONE)\n        )\n",
        f"{SCHEDULES}preempted_requests_keep_their_masks",
    ),
    Mutation(
        "masks go with the batch in its own order",
        V2,
        "ids, starts = input_batch.req_ids,",
        "ids, starts = sorted(input_batch.req_ids, reverse=True),",
        f"{SCHEDULES}requests_that_come_while_others_end_keep_their_masks",
    ),
    Mutation(
        "the prompt of a request that comes back does not hold what was generated",
        V2,
        "        ids = new_req_data.prompt_token_ids",
        "        ids = new_req_data.prefill_token_ids",
        f"{SCHEDULES}a_mask_of_the_prompt_or_of_what_is_generated_is_exact_also_when_preempted",
    ),
)


def main() -> int:
    """Break each promise in turn. Its tests pass before, so what they notice is the mutation."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations")
    parser.add_argument("--v2", action="store_true")
    under_v2 = parser.parse_args().v2
    runner = ["tests.runners", "v2"] if under_v2 else ["pytest", "-p", "no:cacheprovider", "-m", "not engine"]
    unnoticed, passing = 0, set[str]()
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "copy"
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        for name in listed.splitlines():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        for mutation in UNDER_V2 if under_v2 else MUTATIONS:
            path = copy / mutation.file
            content = path.read_text()
            if content.count(mutation.old) != 1:
                raise SystemExit(f"{mutation.file} does not hold the code of {mutation.promise!r} once")
            command = [sys.executable, "-m", *runner, "-x", "-q", *mutation.tests.split()]
            if mutation.tests not in passing:
                whole = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
                if whole.returncode:
                    raise SystemExit(f"{mutation.tests} fails without any mutation:\n{whole.stdout[-3000:]}")
                passing.add(mutation.tests)
            path.write_text(content.replace(mutation.old, mutation.new))
            run = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
            path.write_text(content)
            failed = [line.split(" - ")[0] for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            noticed = run.returncode == 1 and bool(failed)
            unnoticed += not noticed
            by = failed[0] if failed else run.stdout[-300:]
            print("noticed" if noticed else "NOT NOTICED", mutation.promise, by, sep=": ", flush=True)
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main())
