"""
What the quick tier notices: one-line faults in the package, and the tests that fail of each.

This is a script, not a test. `python tests/mutations.py` copies the package and the tests to a temporary folder. It
puts one fault at a time into the copy, and runs the test files named beside the fault until the first failure. A fault
that no test notices is printed as NOT NOTICED, and the script ends with 1. A run out of time has noticed nothing.
`--check` only says whether the text of each fault is still found exactly once.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue


ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_SECONDS = 300
# Runs of pytest are forked from a process that has imported what takes long, and nothing of this package.
PROCESSES = multiprocessing.get_context("forkserver")
PRELOADED = ("pytest", "hypothesis", "transformers.generation.utils", "transformers.models.llama.modeling_llama")
# A file of the package, the test files that are likely to notice its faults, quick ones first, and after | words in
# the names of tests that are tried before the others. Below it the faults: a text that occurs once in the file, with
# «what is right→what the fault puts there».
FAULTS = """
= engine/layer.py: test_small_faults test_batch_rows
self.positions = grown(kept_positions«.masked_fill(indices < 0, -1)→», num_kept, num_slots, fill=-1)
= engine/layer.py: test_small_faults
self.column_positions = «seen.positions if seen.has_gaps else →»None
self.recorded: list[RecordedChunk] = «[]→getattr(self, "recorded", [])»
return tensor«.clone(memory_format=torch.contiguous_format)→»
= engine/layer.py: test_conversation test_modes | commute beam
setattr(self, name, «→tensor if name == "values" else »function(tensor))
are_alike = all(len(set(numbers)) <= «1→2» for numbers in counts)
= engine/layer.py: test_recording test_shadow_kv | taken_back guesses
self.length -= num_columns«→ - 1»
is_turn = «self.turn_begins and →»chunk.num_columns > 1
= engine/layer.py: test_bad_calls | gradients_over precision autocast
setattr(self, name, tensor«.clone()→»)
self._value_dtype = «value_states→key_states».dtype
= engine/layer.py: test_properties test_conversation | sequences H2O
result[:, :, length:] = «fill→0»
= engine/layer.py: test_bad_calls | mask
if «shown != [length + 1 for length in self.row_lengths]→not shown»:
= engine/layer.py: test_save_load
setattr(self, name, «→None if name == "column_positions" else »tensors.get(name))
= engine/cache.py: test_small_faults
«self.layers[index] = copy.deepcopy(self._unused_layers[index])→pass»
= engine/cache.py: test_small_faults | fewer_layers
num_run = «1→2» + max(
= engine/foreign.py: test_small_faults
if is_sliding and layer.get_seq_length() >«=→» layer.sliding_window
= engine/generation.py: test_small_faults | leaves_its_cache
used is not None and used is «not →»given
= engine/cache.py: test_recording
if name == "«_is_user_defined→is_user_defined»":
= engine/policy_cache.py: test_policies test_conversation
num_rows = min(window_size«→ - 1», call.num_queries) if
attention.«mul_(1 - 1 / self.policy.window_size).→»add_(
self.attention[..., self.length «- 1 : self.length→: self.length + 1»] = 0
return [held >«=→» kept + self.num_spare_slots for
«key, value→value, key», positions, self.next_position, num_kept, attention
= engine/policy_cache.py: test_small_faults
(row_positions >«=→» self.next_position[:, 0] - window_size)
= engine/policy_cache.py: test_compress
if self.keys.shape[2] «>→<» self.length:
= engine/policy.py: test_policies test_massive_activation
pooled = pool(ordered, kernel_size, stride=1, padding=kernel_size // 2)«→.roll(1, dims=-1)»
return self.positions >«=→» self.length - most
= engine/policy.py: test_expected_attention
rotary.rotate(self.query, «-→»rotary.model_angles(
return self.is_token & (self.positions <«→=» num_first)
= engine/tokens.py: test_masked_dense test_conversation | later_turns
.tril_(«num_keys - num_queries→0»)
= engine/tokens.py: test_batch_rows | second_padded held
return self._mask is not None« and self._mask() is attention_mask→»
= engine/tokens.py: test_small_faults
is_ascending = «not bool((is_token[:, :-1] & ~is_token[:, 1:]).any())→True»
= engine/tokens.py: test_bad_calls | bidirectional
if not agrees.«all→any»():
= engine/budget.py: test_pyramid test_policies test_massive_activation
for index in by_remainder[: total - sum(numbers)«→ - 1»]:
= engine/budget.py: test_pyramid | decimal
return math.floor(«Fraction(repr(float(fraction)))→fraction» * count)
= engine/budget.py: test_small_faults
(num_layers * batch_size * bytes_per_token)« - num_spare_slots→»
= engine/selection.py: test_batch_rows test_adakv
is_kept = torch.arange(indices.shape[-1], device=priority.device) <«→=» num_kept
= engine/selection.py: test_dtypes
priority.masked_fill(priority.isnan(), «torch.finfo(priority.dtype).min→float("-inf")»)
= engine/scoring.py: test_scoring test_batch_rows
return output, scores« if is_token is None else scores.masked_fill_(~is_token[:, None], 0.0)→»
= engine/scoring.py: test_small_faults
.sum(dim=(2, 3)«, dtype=torch.float32→»)
= engine/rope.py: test_rope
first * cosine «- second * sine, second * cosine +→+ second * sine, second * cosine -» first * sine
elif longest >«→=» self.original_max_position_embeddings:
= engine/rope.py: test_small_faults
compute_dtype = «torch.float64 if dtype == torch.float64 else torch.float32→dtype»
= engine/storage.py: test_save_load | another_architecture
if «differences→not saved»:
= engine/recording.py: test_recording | rows_and_copies
value=self.value[:, :, «:left→-left:»],
for name in ("«query", "→»key", "value")
= engine/ragged.py: test_adakv
is_empty = offsets <«→=» -lengths[..., None]
= engine/ragged.py: test_small_faults
torch.cat([parts[row] for row in «rows→sorted(rows)»])
= engine/prefill.py: test_pyramid | pruned
self.columns = «gather_columns(self.columns, indices) if self.columns is not None else →»indices
= engine/massive.py: test_massive_activation
rotary.rotate(keys, «-→»rotary.model_angles(positions[:, None], longest))
= engine/outputs.py: test_small_faults
value.observe_output(index, «output[0] if isinstance(output, tuple) else output→args[0]»)
= lab/profile/spread.py: lab/test_profile
is_local[«-num_local→1 - num_local»:] = True
= engine/profile.py: test_small_faults
if different«→ is None»:
= engine/low_rank.py: test_shadow_kv | chunks svd
return gram« + basis.mT @ inner @ basis→»
= engine/landmarks.py: test_shadow_kv | by_hand
in_bands(query.«abs().→»float(), num_bands)
= engine/host.py: test_shadow_kv | host_reads
arrives = (incoming >«=→» 0)
= engine/quantization.py: test_shadow_kv | quantised
ratio = excess.clamp(min=1).log2().«ceil→floor»().exp2()
= engine/attention.py: test_architectures | gpt_oss gemma2
None« if self.function is sdpa_attention_forward else self.kwargs.get("softcap")→»
"sink_logits": «self.kwargs.get("s_aux")→None»
= engine/arguments.py: test_bad_calls | reorder
(rows >= -num_rows) & (rows <«→=» num_rows)
= engine/foreign.py: test_save_load | other_kinds
layer.keys, layer.values, layer.cumulative_length = keys, values, «numbers["cumulative_length"]→keys.shape[2]»
layer.recurrent_states[i].«copy_(recurrent→zero_(»)
= engine/fingerprint.py: test_save_load | other_weights
if found is None or found.«digest == self.digest→module == self.module»:
= engine/kept.py: test_plot test_show
shares[layer_idx, max(num_positions - num_latest, 0) «→+ 1 »:] = 1
= caches/adakv.py: test_adakv
floor_ratio=«floor_ratio→0.2»)
= caches/expected_attention.py: test_expected_attention
covariance = covariance + «(share * (1 - share))→share»[..., None] * between
angles = (view.length «→- 1 »+ steps[:, None])
= caches/h2o.py: test_h2o test_properties | hand sequences H2O
self.scores.«scatter_(2, slots, 0.0)→mul_(1)»
is_protected = self.positions >«=→» self.next_position - self.num_recent
positions.masked_fill(is_safe, torch.iinfo(positions.dtype).max).arg«min→max»(
scores[..., :num_earlier] += «self.scores[..., :num_earlier]→0»
= caches/keydiff.py: test_small_faults test_policies
directions = directions.masked_fill(«~view.is_token[..., None]→view.positions[..., None] < -1», 0)
= caches/knorm.py: test_policies
return -(torch.linalg.vector_norm(view.«key→value».float(), dim=-1)
= caches/massive_activation.py: test_massive_activation | loops
return priority«.masked_fill(self._is_massive(positions), float("inf"))→»
= caches/massive_activation.py: test_small_faults
self.row_looked: list[int] = «[]→getattr(self, "row_looked", [])»
= caches/pyramid.py: test_pyramid
(distance >«=→» 0)
(tokens.positions < self.settings.num_sink_tokens«→ - 1») |
= caches/pyramidkv.py: test_policies
least = «max(min(self.window_size, mean - window_size), 1)→1»
= caches/rkv.py: test_policies | redundancy
cosines.diagonal(«offset=start, →»dim1=-2, dim2=-1).zero_()
= caches/shadow_kv.py: test_shadow_kv | reference taken_back
cosines = torch.cosine_similarity(chunks, means[..., None, :], dim=-1).«amin→mean»(dim=-1)
goes = (positions >= self.next_position)« | (positions < self.per_row(self.row_shadow))→»
= caches/shadow_kv.py: test_small_faults
return num_chunks * self.chunk_size + self.tail_capacity - «1→2»
memo[id(self.host_values)] = self.«_host_copy()→host_values»
= caches/snapkv.py: test_policies
scores = view.attention«.masked_fill(is_recent, 0)→»
= caches/streaming_llm.py: test_streaming_llm test_recording | windows batches later base guesses
(columns >«→=» queries - self.window)
[max(length «+ 1 →»- self.window_length, 0) - self.base for
angles = self.rotary.angles(torch.full_like(self.next_position, «self.base - →base - self.»base))
keys = torch.cat([self.«sink_keys→keys[:, :, : self.num_sink_tokens]», self.keys
in_ring = num_sinks + «(position - num_sinks)→position» % self.window
= caches/tova.py: test_policies
view.attention«.masked_fill(view.is_recent(1), float("inf"))→»
= ops/reference.py: ops/test_scores
sink_logits.float().view(1, «kv_heads, group, 1, 1→group, kv_heads, 1, 1).transpose(1, 2»)
= ops/cpu.py: ops/test_scores
dtype=torch.bool, device="cpu").triu_(«1→0»)
= ops/lse.py: ops/test_lse
key_mask[:, None, «key_mask.shape[1] - lse.shape[2] :→: lse.shape[2]»]
= ops/packed.py: ops/test_packed
is_behind = torch.arange(longest, device="cpu") >«=→» torch.tensor(lengths, device="cpu")[:, None, None]
= ops/shadow_cpu.py: ops/test_shadow test_shadow_kv | loop alone
counts = torch.bincount(«rows * kv_heads + heads→heads * batch + rows», minlength
= ops/shadow_reference.py: ops/test_shadow
missing[..., num_places] = «-1→0»
scores = scores.«amax→mean»(dim=2)
= ops/registration.py: ops/test_scores | autocast
with torch.autocast(device_type, enabled=«False→True»):
= ops/triton_scores.py: ops/test_kernels
«tl.where(keys >= start, sums, 0.0)→sums»
mass += tl.sum(«tl.where(logits == float("-inf"), 0.0, probabilities)→probabilities», axis=0)
= ops/triton_packed.py: ops/test_packed_kernels
latest_parts + «(length + part_size - 1)→length» // part_size
= ops/triton_shadow.py: ops/test_shadow_kernels
tl.where(quadrant >«=→» 2, -sine, sine)
"""


@dataclass(frozen=True)
class Mutation:
    """
    A fault.

    Attributes:
        file (`str`): In the package.
        old, new (`str`): What stands in one line of it, and what the fault puts there.
        tests (`str`): Names of test files, apart by spaces.
        words (`str`): In the names of tests that are tried before the others.
    """

    file: str
    old: str
    new: str
    tests: str
    words: str


def read_faults(table: str) -> list[Mutation]:
    """The faults of a table in the form of `FAULTS`."""
    faults, file, tests, words = [], "", "", ""
    for line in table.strip().splitlines():
        if line.startswith("= "):
            file, tests, words = re.fullmatch(r"= ([^:]+): ([^|]+?)(?: \| (.+))?", line).groups(default="")
            continue
        before, right, wrong, after = re.fullmatch("(.*)«(.*)→(.*)»(.*)", line).groups()
        faults.append(Mutation(file, before + right + after, before + wrong + after, tests, words))
    return faults


def problem_of(fault: Mutation) -> str | None:
    """Why a fault cannot be put into the package; None if it can."""
    path = ROOT / "pyramid_cache" / fault.file
    if not path.exists():
        return "there is no such file"
    count = path.read_text().count(fault.old)
    return None if count == 1 else f"the text is found {count} times"


def pytest_in(folder: Path, arguments: list[str], output: Path) -> None:
    """Runs pytest in a copy, in a process of its own, which has what `PRELOADED` names already."""
    os.setsid()  # so that what tests start ends with them
    os.chdir(folder)
    sys.path[:] = [str(folder), *(path for path in sys.path if not Path(path).is_relative_to(ROOT))]
    sys.dont_write_bytecode = True
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    arguments = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "--tb=no", *arguments]
    if any("kernels.py" in argument for argument in arguments):
        # As test_interpreter.py runs them: the interpreter is chosen when Triton is imported.
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments, "-m", "cuda"])
    import pytest

    sys.exit(pytest.main(arguments))


def run_pytest(folder: Path, arguments: list[str]) -> tuple[int | None, list[str]]:
    """The exit status of pytest in a copy, None if it ran out of time, and the lines that name what failed."""
    shutil.rmtree(folder / ".hypothesis", ignore_errors=True)  # what failed of another fault
    output = folder / "output.txt"
    process = PROCESSES.Process(target=pytest_in, args=(folder, arguments, output))
    process.start()
    process.join(TIMEOUT_SECONDS)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return None, []
    return process.exitcode, [line for line in output.read_text().splitlines() if re.match("(FAILED|ERROR) ", line)]


def try_fault(fault: Mutation, folder: Path) -> dict[str, object]:
    """Puts a fault into a copy, runs its tests and takes it out again."""
    result: dict[str, object] = dataclasses.asdict(fault) | {"noticed_by": None, "outcome": "NOT NOTICED"}
    problem = problem_of(fault)
    if problem is not None:
        return result | {"outcome": f"BROKEN: {problem}", "seconds": 0.0}
    path = folder / "pyramid_cache" / fault.file
    text, times = path.read_text(), path.stat()
    path.write_text(text.replace(fault.old, fault.new))
    os.utime(path, (times.st_atime, times.st_mtime + 10))  # not the time of the compiled file
    start = time.monotonic()
    files = [f"tests/{name}.py" for name in fault.tests.split()]
    for file in files:
        if not (folder / file).exists():
            print(f"There is no {file} any more, which was named for {fault.file}: {fault.new}", flush=True)
    files = [file for file in files if (folder / file).exists()]
    status, failed = 0, []
    if files and fault.words:
        status, failed = run_pytest(folder, [*files, "-k", fault.words.replace(" ", " or ")])
    if files and status in (0, 5):  # 5: no test has such a name
        status, failed = run_pytest(folder, files)
    if status == 1 and failed:
        test, _, message = failed[0].partition(" - ")
        result |= {"outcome": "noticed", "noticed_by": test.removeprefix("FAILED "), "message": message[:200]}
    elif status != 0:
        result["outcome"] = "TIMED OUT" if status is None else f"BROKEN: pytest ended with {status}"
    path.write_text(text)
    os.utime(path, (times.st_atime, times.st_mtime))
    return result | {"seconds": round(time.monotonic() - start, 1)}


def copy_to(folder: Path) -> Path:
    """A copy of all that tests look at, compiled."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "lab-out", "site")
    shutil.copytree(ROOT, folder, ignore=ignored)
    subprocess.run([sys.executable, "-m", "compileall", "-q", folder / "pyramid_cache"], check=True)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[""], help="faults whose file, text or tests have one of these")
    parser.add_argument("--jobs", type=int, default=1, help="how many to try at once")
    parser.add_argument("--json", type=Path, help="where to write what came out")
    parser.add_argument("--check", action="store_true", help="only whether each text is found once")
    arguments = parser.parse_args()
    faults = [
        fault
        for fault in read_faults(FAULTS)
        if any(part in f"{fault.file} {fault.old} {fault.new} {fault.tests}" for part in arguments.only)
    ]
    problems = {fault: problem for fault in faults if (problem := problem_of(fault)) is not None}
    for fault, problem in problems.items():
        print(f"{fault.file}: {fault.old}: {problem}")
    if arguments.check:
        print(f"{len(faults)} faults, {len(problems)} that cannot be put in")
        return int(bool(problems))

    PROCESSES.set_forkserver_preload([*PRELOADED])
    results: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="mutations-") as scratch:
        copies: SimpleQueue[Path] = SimpleQueue()
        for job in range(arguments.jobs):
            copies.put(copy_to(Path(scratch) / str(job)))

        def run(fault: Mutation) -> None:
            folder = copies.get()
            result = try_fault(fault, folder)
            copies.put(folder)
            results.append(result)
            outcome = f"noticed by {result['noticed_by']}" if result["noticed_by"] else result["outcome"]
            print(f"{fault.file}: {fault.old} → {fault.new}: {outcome}, {result['seconds']} s", flush=True)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(results, indent=1))

        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(run, faults))
        # What fails without a fault, too, has noticed none. Tests of kernels run apart from the others.
        tests = sorted({str(result["noticed_by"]) for result in results if result["noticed_by"]})
        kernels = [test for test in tests if "kernels.py" in test]
        folder = copies.get()
        runs = [run_pytest(folder, part) for part in (kernels, [t for t in tests if t not in kernels]) if part]
    wrong = [run for run in runs if run[0] != 0]
    unnoticed = [result for result in results if result["outcome"] != "noticed"]
    print(f"{len(results)} faults, {len(results) - len(unnoticed)} noticed, {len(unnoticed)} not")
    for result in unnoticed:
        print(f"{result['outcome']}: {result['file']}: {result['old']} → {result['new']}")
    for status, failed in wrong:
        print(f"Without a fault, tests that noticed one end with status {status}: {' '.join(failed)}")
    return int(bool(unnoticed) or bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
