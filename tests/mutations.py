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
# «what is right→what the fault puts there». A ¶ stands for a new line of a method.
FAULTS = """
= serving/request.py: test_serving
rows = self.rows[:«num_slots→num_slots - 1»]
self.queries[layer_idx] = query[:, :, «-self.num_queries→-1» :] if self.num_queries else query
has_moved = «was_dense != state.is_dense or →»state.length != length + (free is None)
if has_moved« or layer.policy.repositions→»:
slots = torch.tensor([«length→length - 1»], device=keys.device) if free is None else free[0, :, 0]
sees_all = policy.window_size is None or «watches→False» or layer
return 0 if «sees_all→False» else max(policy.window_size or 0, 2)
is_visible = is_visible.tril(«num_keys - call.num_queries→0»)[None, None]
other.layers, other.queries = copy.deepcopy(self.layers), «dict(self.queries)→{}»
= serving/paged.py: test_serving
return request.num_slots if request is not None and request.is_compressed else «past_length→0»
request«.unpark(self.pages_of(request_id))→»
del table[«num_blocks→num_blocks + 1»:]
return 0 if request is None or request.parked is None else «request.num_seen→0»
elif request is not None and request.parked is not None and «not request.waits→True»:
if each.ends_prompt and «depth == len(allocator.layer_indices) - 1→False»:
«self.allocator.requests.clear()→pass»  # those
ends_prompt = «not self.states[request_id].remaining_prefill_tokens→True»
= serving/manager.py: test_serving
layer.check_lengths([«length→10**4»])
whole = length + (num_new or 1) - «1→9»  # the
return lambda *args, **kwargs: (build if «threading.get_ident() == thread→True» else
«delattr(model, name)→pass»
differs = any(«→False and »
= engine/rope.py: test_serving | streaming
or (name == CACHE_ARGUMENT and «value is not None→False»)
= ops/quantized.py: test_quantized | round_trips
low = «as_float16(lows)→as_float16(lows + 0.1)»
return (1 << self.bits) - «1→2»
codes = grouped / scale«.masked_fill(scale == 0, 1)→».unsqueeze
packed = packed | part << packing.bits * «index→1»
= ops/quantized.py: test_quantized | in_tiles
if «softcap→False»:
self.codes >> bits * «part→1» if part
return torch.«eye(num_groups→ones(num_groups, num_groups», dtype
products.mul_(scale[:, :, None, «tile→: products.shape[-1]»])
return scales * «FLOAT8_FACTOR→1», None
= engine/quantized_store.py: test_quantized | logits
counts[0]), in_order(positions, is_latest, «max(counts[1], 1)→1»)
is_old, is_latest = «(positions >= 0)→(positions >= 1)» & (positions < starts)
latest - «state.num_quantized→0») for name in FIELDS
= engine/quantized_store.py: test_quantized | quantised_once
found[field] = new if earlier is None else torch.where(stays[..., None], «earlier→new», new)
= engine/quantized_store.py: test_quantized | batch alone
return torch.nn.functional.pad(is_token.sum(dim=-1).cumsum(dim=-1), «(1, 0)→(0, 1)»)
return torch.where((starts «<→<=» before)[..., None], held, new)
= engine/quantized_store.py: test_quantized | nearly_as_good
stays = has_codes« & (quantizer.coded(name, *held).restored(numbers.dtype) == numbers).all(dim=-1)→»
= engine/quantized_store.py: test_quantized | damaged
if like is None or «(found.dtype, tuple(found.shape)) != (like.dtype, shape)→False»:
= engine/quantized_store.py: test_quantized | way_out
if «needs_gradients(call.query, call.key, call.value)→False»:
= engine/quantization.py: test_quantized | logits bytes
return max(row_length - self.residual_length, 0) // self.block_length * «self.block_length→1»
= engine/evicting.py: test_quantized | weighed_before
if «self.policy.weighs_values→False» and not self.budget.is_unlimited and
= engine/evicting.py: test_quantized | budget_in_bytes
num_spare += «-(-most_latest * bytes_of_latest // self.bytes_per_token)→0»
= engine/thin_keys.py: test_thin_keys | hand_computed last_queries
window = length.clamp(min=1, max=«WINDOW→WINDOW + 1»)
squares = query.float().square().unflatten(1, «(kv_heads, -1)→(-1, kv_heads)»).mean(dim=2)
mean + earlier * «(1 - is_in_window.sum(dim=2) / window)→0.5»
«torch.where(is_token[..., None], key.float().square(), 0.0)→key.float().square()».sum(dim=2)
«torch.where(is_in_window, squares, 0.0)→squares * is_in_window».sum(dim=2)
order = (query_squares * squares).argsort(dim=-1, stable=True«→, descending=True»)
return width - «floor_of_product(ratio, width)→round(ratio * width)»
= ops/quantized.py: test_thin_keys | masked_run restored
queries = queries.gather(-1, «channels→(channels * 0)».
= engine/quantized_store.py: test_thin_keys | masked_run restored alone
keys = held.«new_zeros→new_ones»(*held.shape[:-1], self.state.keys.shape[3])
is_first = [«not earlier and →»old > 0 for
chosen if held is None«→ or any(is_first)» else torch.where
if «all→any»(num_old):
= engine/quantized_store.py: test_thin_keys | formula
for field in («"key_groups", "key_channels"→"key_groups",»)}
= engine/quantized_store.py: test_thin_keys | damaged
if tensor is None or not is_thin or «(tensor.dtype, list(tensor.shape)) != (dtype, [*rows[:2], size])→False»:
if tensor is None and not (is_thin and «is_needed→False»):
(state.key_channels < width))«.all()→.any()»:
= engine/quantization.py: test_thin_keys | budget_in_bytes
widths = «self.key_width(key_dim)→key_dim», value_dim
= engine/quantization.py: test_thin_keys | formula
THIN_RESIDUAL_LENGTH = «32→128»
= engine/evicting.py: test_thin_keys | taken_back
if «self.chooses_channels→False» and any(map(
or observes or reads_again« or self.chooses_channels→»
= engine/policy_cache.py: test_thin_keys | way_out
if «quantizer is not None and quantizer.thin_keys→False» and policy.repositions:
= caches/minicache/merging.py: test_minicache | by_hand none_between
between = ((1 - interpolation) * safe).sin() * «first→second» +
between = torch.where(safe > math.pi - «LEAST_ANGLE→-9», nearer, between)
nearer = «second if interpolation >= 0.5 else first→second»
safe = angles«.clamp(min=LEAST_ANGLE)→»[..., None]
(self.directions.float() * self.norms[..., «layer : layer + 1→0:1»].float())
= caches/minicache/merging.py: test_minicache | logits
starts = torch.arange(num_blocks, device=places.device)[:, None] * «block_length→0»
places = blocks.sort(dim=-1, descending=«True→False», stable=True)
norms[..., 0].scatter_(2, slots, «1→2»)
return max(row_length - self.residual_length, 0) // self.block_length * «self.block_length→1»
= caches/minicache/store.py: test_minicache | logits
restored = merged.restored(«int(self.first is not None)→0», self.merger.block_length)
latest = in_order(positions, positions >= «starts→0», num_latest)
merged.masked_fill(merged «>=→>» starts, -1)
held[row_index, :, «start:stop→:count»] = tensor[row_index, :, :count]
= caches/minicache/store.py: test_minicache | damaged
if «state.row_quantized != self.first.state.row_quantized→False»:
dtype = «torch.uint8 if index == 3 else tensors[name].dtype→tensor.dtype if tensor is not None else None»
= caches/minicache/store.py: test_minicache | way_out
if «needs_gradients(call.query, call.key, call.value)→False»:
= caches/minicache/store.py: test_minicache | bytes
roles = {field: f"{«name→'bookkeeping'»} {field}" for name, fields
= caches/minicache/cache.py: test_minicache | pairs
if is_full[index - 1] and «is_full[index] and →»index - 1 not in pairs:
range(«start_layer + 1→1», len(is_full))
= caches/minicache/cache.py: test_minicache | way_out
can_fix = «False→True»
if self.is_initialized and «not self.is_croppable and →»-tokens_to_remove > self.pending
= caches/kv_sharer.py: test_kv_sharer | logits
return «self.lender.attended()→super().attended()»
self.state.length += «key.shape[2]→1»
= caches/kv_sharer.py: test_kv_sharer | gradients
self.lender.is_saved |= «is_saved→False»
= caches/kv_sharer.py: test_kv_sharer | modes
return «keys.to(key.device)→keys», values.to(value.device), arrival
= caches/kv_sharer.py: test_kv_sharer | files
self.state.keys = self.state.values = «None→self.state.keys»
= caches/kv_sharer.py: test_kv_sharer | cannot_be
if «lender in found→False»:
if «not 0 <= lender < layer < num_layers→layer >= num_layers»:
if «len(found) < len(pairs)→False»:
if «differences→False»:
= lab/profile/sharing.py: test_kv_sharer | by_hand chains loops
sorted(distances.items(), key=lambda item: «-→»item[1])
if «all(one.shape == other.shape for one, other in pairs)→True»:
target = «sharing.get(earlier, earlier)→earlier»
return {layer: «target if lender == later else lender→lender» for
if similarity > «least_similarity→-2»:
if «later in sharing→False»:
= engine/store.py: test_policies
held.mul_(1 - «1 / window→0»)
= engine/store.py: test_small_faults test_batch_rows
setattr(self.state, name, kept if tensor.dim() == 4 else kept«.masked_fill(indices < 0, fill)→»)
masked_fill_(~is_kept_before, «-1→0»)
empty = torch.where(is_over, float("inf"), float("«-→»inf"))
ages = positions.masked_fill(«is_over & ~is_token→positions < -1», torch
= engine/store.py: test_small_faults
return tensor«.clone(memory_format=torch.contiguous_format)→»
steps = state.next_position + torch.arange(-num_steps«, 0→ + 1, 1»,
= engine/store.py: test_compress | has_grown
and max(row_lost) <= 1« and has_free_slots→»:
= engine/store.py: test_bad_calls | gives_its_slot
self.state.positions.scatter_(2, free_slots, «-1→0»)
= engine/store.py: test_batch_rows | held_whole
differ = mask is not None and mask.shape[1] >« 1→ 9»
= engine/store.py: test_remembering
columns |= {name: getattr(self.state, name) for name in (*«self.state.own_slots→[]», *CODES)}
= engine/evicting.py: test_remembering
state.resize_own_slots(«view.key.shape[2]→0»)
= engine/store.py: test_policies test_h2o | held victims hand
moves = torch.arange(num_moves, device=is_kept.device) <«→=» is_kept_behind
= engine/store.py: test_remembering
tensor.scatter_(2, expanded(slots, tensor), «state.fill_of(name)→9.0»)
= engine/store.py: test_h2o test_properties | hand sequences H2O
state.free_slots = torch.full_like(indices[..., :1], state.length - «1→2»)
= engine/store.py: test_batch_rows | second_padded held
num_filled = «max→min»(self.state.row_held) if self.heads_keep
= engine/store.py: test_bad_calls | gradients_over precision autocast
setattr(self.state, name, tensor«.clone()→»)
= engine/store.py: test_save_load
setattr(self.state, name, «→None if name == "column_positions" else »tensors.get(name))
= engine/sharing.py: test_protect | share
num_own = max([1«, *protected[row : row + 1]→»])¶num_best
if protected«→ and False»:
= engine/protection.py: test_protect | hand forms may_take repeats other_rows
return priority«.clamp(max=torch.finfo(priority.dtype).max)→».masked_fill
tuple(sorted(«set(row)→row»)) for row
return [] if rest else [span for «span in spans for _ in range(repeats)→_ in range(repeats) for span in spans»]
*[«MAX_TOKENS→0»] * (longest
= engine/evicting.py: test_protect | refus other_rows fit
self.state.row_protected = [len(span) for span in spans«→[:1]»]
checks.check_protected(self, «seen→self.state».row_lengths)
«checks.check_protected(self, self.state.row_lengths)→pass»
super().check_lengths(row_lengths)¶«checks.check_protected(self, row_lengths)→pass»
= engine/fixed.py: test_protect | rank may_take
if self.is_steady« and state.protected is None→» and self.store.ranks
= engine/checks.py: test_protect | fit
if (least := «min→max»(kept)) < number:
= engine/policy_cache.py: test_protect | forms
given |= {"protect": plain_setting(spans)} if spans«→ and False» else {}
= caches/streaming_llm.py: test_protect | at_once Streaming
num_sinks, parsed = max(policy.num_sink_tokens«, num_protected→, 0»)
if any(«len(span) != num_protected or →»span[num
or span[num_protected - 1] >«= num→ 99 + num»_protected for
= engine/replay.py: test_kvzip
return num_new > 1 or «not row_lengths or not all(row_lengths)→False»
self.ids.gather(1, is_token.int().argsort(dim=1, stable=True«)→, descending=True)»
num_leading = «min(NUM_LEADING_TOKENS, self.chunk_size) if number else →»0
= engine/compaction.py: test_bias
masses = torch.ones_like(positions, dtype=torch.float32) if bias is None else «bias.exp()→torch.ones_like(bias)»
nearest = cosines«.masked_fill_(~is_known[:, :, None], float("-inf"))→».argmax(dim=-1)
unit = «functional.normalize(key.float(), dim=-1)→key.float()»
= engine/scoring.py: test_bias
softmax_of_logits(logits« + bias[..., :visible]→», is_visible
= engine/fixed.py: test_bias
if layer.compactor is not None and «state.bias is None→False»:
= engine/ragged_store.py: test_bias
bias = «self.tensors["bias"] if "bias" in self.tensors else →»None
= engine/layer.py: test_bias
«grown(self.bias, self.bias.shape[2], call.num_keys, fill=0)→None»)
= engine/sharing.py: test_layers_share
best = scores.sort(descending=True, stable=True).indices[«:num_best→-num_best:»].cpu()
if «fits[row]→False»:
// heads« + num_own→»).tolist()
num_best = sum((numbers[row]« - num_own→») * num for
numbers[row] = «min(count, before[row])→count»
«if not must_evict:→if False:»  # the scores
* min(self.left[row] / («num_layers * →»present), 1)
most = min(max(count, own), «most→present»)
= engine/state.py: test_properties test_recording | sequences
result[:, :, length:] = «fill→0»
setattr(self, name, «→tensor if name == "values" else »function(tensor))
setattr(self, name, [numbers[«index→0»] for index in rows] if numbers
= engine/state.py: test_batch_rows test_small_faults
return «min→max»(self.row_held) < self.length
= engine/held.py: test_small_faults
self.pending = «PendingTokens()→getattr(self, "pending", PendingTokens())»
= engine/held.py: test_properties test_modes | sequences beam
are_alike = all(len(set(numbers)) <= «1→2» for numbers in counts)
= engine/held.py: test_recording | rows_and_copies
counts += «[chunk.seen.row_lengths for chunk in self.pending.chunks]→[]»
self.pending.map(lambda chunk: chunk.map_rows(«rows→sorted(rows)»))
= engine/held.py: test_bad_calls | precision autocast
value.shape[3], key.dtype, «value→key».dtype, key.device)
= engine/layer.py: test_small_faults
state.column_positions = «seen.positions if seen.has_gaps else →»None
= engine/layer.py: test_recording test_shadow_kv | taken_back guesses
state.length -= num_columns«→ - 1»
= engine/layer.py: test_bad_calls
(key.shape, value.shape, key.dtype, value.dtype, «modes→self._known[4]»)
elif self.place.depth «== 0→< 0»:
elif «call.function is not step.function or call.module is not self._module()→False»:
= engine/layer.py: test_bad_calls | change_nothing
self.store.take_back(«arrival.num_new→0», arrival.free_slots)
= engine/checks.py: test_bad_calls | mask change_nothing
if «shown != expected→not shown»:
= engine/checks.py: test_batch_rows | may_not apart
held.masked_fill(held >«=→» layer
if hides_some«→ and False» or layer
if «layer.pending.is_on or →»not layer.state.is_dense or
= engine/pending.py: test_recording | what_stays commute
is_turn = «self.begins_turn and →»chunk.num_columns > 1
= engine/pending.py: test_recording | rows_and_copies
value=self.value[:, :, «:left→-left:»],
for name in ("«query", "→»key", "value")
= engine/evicting.py: test_policies
num_rows = min(max(state.row_windows)«→ - 1», call.num_queries)
is_due = [held >«=→» kept + interval for
held = call.«key, call.value→value, call.key», attention
= engine/evicting.py: test_pyramid | held settings
or not tokens.is_ascending« or len(set(state.row_windows)) > 1→»:
return (1 + slope * («window - 1 - →»ages)) /
= engine/evicting.py: test_pyramid | pruned
state.must_evict or takes_share« or tokens.row_present != tokens.row_lengths→»
= engine/evicting.py: test_small_faults
is_in_window = (positions >= 0) & (ages <«→=» window)
+= «share_left * →»earlier
state.column_positions is None else self.store.column_tokens().positions >«=→» 0
= engine/evicting.py: test_recording
self.state.has_traces |= «self.policy.window_size != 0 or →»observes
= engine/evicting.py: test_batch_rows
row_left = [min(held, kept)« if due else held→» for held, kept, due in rows]
= engine/evicting.py: test_compress
state.num_slots «>→<» state.length:
= engine/cache.py: test_small_faults
«self.layers[index] = copy.deepcopy(self._unused_layers[index])→pass»
= engine/cache.py: test_small_faults | fewer_layers
num_run = «1→2» + max(
= engine/cache.py: test_compile | end_fixed
tokens_to_remove = as_tokens_to_remove(tokens_to_remove)¶«self.release()→pass»
«self.release()→pass»¶self.require_whole()¶if any(
«self.release()→pass»¶super().reorder_cache(
memo: dict[int, Any]) -> "CompressedCache":¶«self.release()→pass»
= engine/graph_steps.py: test_compile | not_counted
self.is_counted = self.is_whole = «False→True»
= engine/graph_steps.py: test_compile | user_compiles one_graph
self.num_seen.add_(«1→0»)
= engine/graph_steps.py: test_compile | refused
checks.«check_fixed(step.layer, key, value)→check_attended(step.layer)»
= engine/cache.py: test_compile | modes_that
all(layer.can_fix« and not layer.record_past→» and layer.store.ranks
= engine/cache.py: test_bad_calls | broken_off broke break
if layer_idx != self._first or «layer.get_seq_length() == last.get_seq_length()→True»:
= engine/foreign.py: test_small_faults
if is_sliding and layer.get_seq_length() >«=→» layer.sliding_window
= engine/generation.py: test_small_faults | leaves_its_cache
used is not None and used is «not →»given
= engine/generation.py: test_compile | modes_that given_or_refused
if «given.compiles is not None→False»:
config.num_beams == 1« and not config.output_attentions→»
= engine/fixed.py: test_compile | one_graph nothing_moves
self.cursor.«fill_(state.length)→fill_(state.length - 1)»
self.is_steady = «self.is_steady or store.is_steady→True»
mask = state.positions[:, :, : call.num_keys] >= 0 if «self.has_gaps→False» else None
self.has_gaps = not self.is_steady and (self.evicts« or self.in_graph→» or
attention.mul_(1 - «1 / self.window→0»)
tensor.new_tensor(«state.fill_of(name)→9.0»)
moved = «self.layer.policy.moved_in_graph(self.view)→None»
cursor.add_(«1→0»)
= engine/fixed.py: test_compile | base
elif «layer.policy.moves_between_steps(state)→False»:
= engine/fixed.py: test_streaming_llm | settings
state.row_held = [«min(held, kept)→held» for held, kept
= engine/fixed.py: test_compile | end_fixed
order = positions«.masked_fill(positions < 0, torch.iinfo(positions.dtype).max)→»
if «self.was_dense→False»:
if «not self.was_dense or state.row_held != state.row_lengths→True»:
if not self.was_dense« or state.row_held != state.row_lengths→»:
slots = positions« + (num_slots - store.per_row(state.row_lengths))→»
= engine/fixed.py: test_bad_calls | gives_its_slot change_nothing last_one
self.state.positions.scatter_(2, self.state.free_slots, «-1→0»)
self.state.positions[:, :, self.state.length - 1] = «-1→0»
= engine/fixed.py: test_compile | policy_sees
self.view.longest = state.next_position.amax() if self.in_graph else max(state.row_lengths)«→ + 1»
= engine/layer.py: test_compile | end_fixed be_recorded
self._step = «None→self._step»  # which holds on
and «not self.pending.is_on→True»
= engine/layer.py: test_bad_calls | gradients_over
and «modes[1:] == (False, False)→True»:
= engine/evicting.py: test_compress test_compile
self.take_step(«None→self._step»)
= engine/evicting.py: test_streaming_llm
newest, move = self.state.next_position« - 1→»,
= engine/evicting.py: test_compile | everything
(max_length is not None« and max_length > self.state.num_seen→»)
= engine/store.py: test_compile | one_graph nothing_moves
«self.clear_behind(num_left)→pass»
return max(self.state.row_kept, default=0)« + self.interval→»
= engine/store.py: test_h2o | different_numbers
is_full = state.row_held == state.row_kept« and min(state.row_kept) == state.length - 1→»
= engine/state.py: test_compile | base
held.copy_(«tensor→held»)
= engine/cache.py: test_recording
if name == "«_is_user_defined→is_user_defined»":
= engine/policy.py: test_policies test_massive_activation
pooled = pool(ordered, kernel_size, stride=1, padding=kernel_size // 2)«→.roll(1, dims=-1)»
return self.positions >«=→» self.length - most
= engine/policy.py: test_expected_attention
rotary.rotate(self.query, «-→»rotary.model_angles(
return self.is_token & (self.positions <«→=» num_first)
= engine/tokens.py: test_masked_dense test_conversation | later_turns
.tril_(«num_keys - num_queries→0»)
= engine/tokens.py: test_batch_rows | within_the_window
is_ascending = «not bool((is_token[:, :-1] & ~is_token[:, 1:]).any())→True»
= engine/tokens.py: test_batch_rows | second_padded held
return self._mask is not None« and self._mask() is attention_mask→»
= engine/tokens.py: test_bad_calls | bidirectional
if not agrees.«all→any»():
= engine/budget.py: test_pyramid test_policies
for index in by_remainder[: total - sum(numbers)«→ - 1»]:
= engine/budget.py: test_pyramid | decimal
return math.floor(«Fraction(repr(float(fraction)))→fraction» * count)
= engine/budget.py: test_small_faults
(num_layers * batch_size * bytes_per_token)« - num_spare_slots→»
= engine/selection.py: test_batch_rows test_adakv
is_kept = torch.arange(indices.shape[-1], device=priority.device) <«→=» num_kept
= engine/selection.py: test_dtypes
priority.masked_fill(priority.isnan(), «torch.finfo(priority.dtype).min→float("-inf")»)
= engine/selection.py: test_h2o | victims hand
.arg«min→max»(dim=-1, keepdim=True)
= engine/scoring.py: test_scoring test_batch_rows
return output, scores« if is_token is None else scores.masked_fill_(~is_token[:, None], 0.0)→»
= engine/scoring.py: test_small_faults
.sum(dim=(2, 3)«, dtype=torch.float32→»)
= engine/rope.py: test_rope
{name: «sign * →»tensor for name
name: «copy.deepcopy(buffer)→buffer» for name
if len(makers) «!= 1→== 0»:
= engine/rope.py: test_rope | probed_once
if known is None« or known.dependencies != known.dependencies_now(module)→»:
return («object(),→»)
tensors = (*module.parameters(), *module.buffers(), «*rotary.buffers()→»)
= engine/rope.py: test_vision | noticed
positions.dim() == 3 and (positions != positions[«:1→:»]).any()
= engine/layer.py: test_vision | noticed
if self.needs_rotary and «call.num_queries > 1→self.module is None» and not
= engine/rotation.py: test_rope
torch.cat([«-second, first→second, -first»], dim=-1)
torch.stack([«-rotated[..., 1::2], →rotated[..., 1::2], -»rotated[..., 0::2]]
longest >«→=» self.original_max_position_embeddings
= engine/rotation.py: test_small_faults
compute_dtype = «torch.float64 if states.dtype == torch.float64 else torch.float32→states.dtype»
= engine/files.py: test_save_load | another_architecture
if «differences→not saved»:
= lab/profile/spread.py: lab/test_profile
is_local[«-num_local→1 - num_local»:] = True
= engine/attention.py: test_architectures | gpt_oss gemma2
None« if self.function is sdpa_attention_forward else softcap→»
"sink_logits": «sink_logits→None»
= engine/arguments.py: test_bad_calls | reorder
(rows >= -num_rows) & (rows <«→=» num_rows)
= engine/foreign.py: test_save_load | other_kinds
layer.keys, layer.values, layer.cumulative_length = keys, values, «numbers["cumulative_length"]→keys.shape[2]»
layer.recurrent_states[i].«copy_(recurrent→zero_(»)
= engine/fingerprint.py: test_save_load | other_weights
if found is None or found.«digest == self.digest→module == self.module»:
= plot/held.py: test_plot test_show
shares[layer_idx, max(num_positions - num_latest, 0) «→+ 1 »:] = 1
= caches/adakv.py: test_adakv
kernel_size, «floor_ratio→0.2»)
= engine/ragged_store.py: test_adakv
is_empty = offsets <«→=» -lengths
= engine/ragged_step.py: test_adakv | fixed_steps
num_more = 0 if num_packed == state.row_kept else «layer.eviction_interval - 1→0»
mask = state.positions >= 0 if «self.in_graph→False» else None
self.packed.starts.copy_(«store→self».packed.starts)
store.clear_behind(«0→self.state.keys.shape[2]»)
tensors = {name: tensor«[:num_packed]→» for name
= engine/ragged_store.py: test_small_faults | padding_between
row_weights = row_weights.«repeat_interleave(kv_heads, dim=0)→repeat(kv_heads, 1)»
= engine/ragged_store.py: test_small_faults
torch.cat([parts[row] for row in «rows→sorted(rows)»])
= caches/critical_kv.py: test_critical_kv | each_token
.topk(min(num_new«→ - 1», view.positions.shape[-1])
= caches/critical_kv.py: test_critical_kv | reference
ordered = scores.gather(-1, «order→order.flip(-1)»)
if view.ranking == "«head→»":
return ((scores + «self.epsilon→0.1») * weigh_values(view)
= caches/vl_cache.py: test_vl_cache | loops
THRESHOLD = «0.01→0.02»
positions >= prompt.length[:, 0] - «windows→1»)
is_low = probabilities < THRESHOLD * probabilities.amax(dim=«-1→(1, 2, 3)», keepdim=True)
hardly[:, head] += (is_low« & is_counted→»)
[«1 - →»state.sparsity[:, 0, 0].cpu()
floor_of_product(self.recent_ratio, kept)«→ + 1», 1)
length - end if 0 < end < length else «self.window_size→1»
= caches/vl_cache.py: test_vl_cache | hand
least = max([floor_of_product(LEAST_SHARE, length), 1«, *states[0].row_protected[number : number + 1]→»])
if min(kept) >=« length→ 10**6»:
= caches/vl_cache.py: test_vl_cache | tells later_turns
return types «!=→==» 0
stops = [0 if span is None else span[«1→0»] for
torch.maximum(ends, first_of(query_positions))«.masked_fill(ends == 0, 0)→»
= caches/vl_cache.py: test_vl_cache | fit
if span is not None and span[1] > «length→10**6»:
= engine/evicting.py: test_vl_cache | fit
«self.policy.check_rows(seen.row_lengths)→pass»
= engine/sharing.py: test_vl_cache | loops
strict=True):¶    layer.set_kept(«row_kept→layer.state.row_kept»)
= caches/defensive_kv.py: test_defensive_kv | reference
earlier.masked_fill(num_new >«=→» self.window_size, 0)
positions < prompt.length[:, 0] - «self.window_size→1»)
pooled *= given.sum(dim=-1, keepdim=True) / «pooled→given».sum(
scores = (torch.maximum(scores, «means→0 * means») * weights)
= caches/defensive_kv.py: test_defensive_kv | reference hand
(ranks <«→=» view.num_kept - num_recent)
view.positions.expand_as(given).argsort(dim=-1, descending=«True→False»)
is_near = view.positions >= view.length - «2→1» * self.window_size
= engine/evicting.py: test_critical_kv | refused_before
if «self.module is None→False» and self.policy.weighs_values:
= caches/expected_attention.py: test_expected_attention
covariance = covariance + «(share * (1 - share))→share»[..., None] * between
angles = rotary.angles(view.length «→- 1 »+ torch.arange
= caches/h2o.py: test_h2o test_properties | hand sequences H2O
view.positions >«=→» view.length - view.state.num_recent
= caches/attention_matching.py: test_attention_matching
columns = num_queries[:, None] - 1 - places * num_queries[:, None] // taken[:, None].clamp(min=1)«→ * 0»
positions = view.query_positions[:, 0].gather(1, columns)«.masked_fill(~is_query, -1)→»
is_kept = stays« & ~is_fixed→»
probabilities = probabilities«.masked_fill(is_other, 0)→»
biases[places] += «weights.log()→weights»
masses = attended.sum(dim=-1, keepdim=True)« + others→»
(positions[:, None] <= «references.positions[rows, :, None]→99999»)
missing = attended.mT @ (wanted - attended @ «old→torch.zeros_like(old)»)
«is_matched(chunk.turn_starts, chunk.turn_lengths) * →»shares.clamp(min=1)
= caches/keydiff.py: test_small_faults test_policies
directions = directions.masked_fill(«~view.is_token[..., None]→view.positions[..., None] < -1», 0)
= caches/knorm.py: test_policies
return -(torch.linalg.vector_norm(view.«key→value».float(), dim=-1)
= caches/kv_merger.py: test_kv_merger
follows = may_join & «functional.pad(may_join[..., :-1], (1, 0), value=False)→may_join» & (cosines >= self.threshold)
«totals→highest».gather(-1, sets), ordered - ordered.amax
candidates = places.masked_fill(ordered «<→>» highest.gather(-1, sets), -1)
is_single = is_single |« is_protected(view.positions, view.state.protected)→ False»
weights = masses * «torch.exp(-squares / (2 * widths.gather(-1, target)).clamp(min=tiny))→1»
joins = «~is_kept & →»(positions >= 0)
= caches/kvzip.py: test_kvzip
always_stays = «(importance < 0) & →»view.is_recent
view.is_recent(self.num_recent) | view.is_first(«NUM_SINK_TOKENS→0»)
is_sink = (positions < NUM_SINK_TOKENS)« & (positions < starts[:, None, None])→»
[gather_tokens(view.key[:, head : head + 1], indices), view.key[:, «head : head + 1→:1», num_held:]]
is_before = torch.arange(num_queries, device=device) «<=→<» queries
found.masked_fill((queries >«=→ 99 +» num_asking[:, None])
= caches/massive_activation/cache.py: test_massive_activation | reference generated eight
scores«.masked_fill(self.is_massive(view), float("inf"))→»
latest = positions.argsort(dim=-1)[..., «-num_new:→:num_new»]
= caches/massive_activation/detection.py: test_massive_activation
rotary.rotate(keys, «-→»rotary.model_angles(positions[:, None], longest))
= caches/pyramid/cache.py: test_pyramid
always_stays = is_recent« | view.is_first(self.num_sink_tokens)→»
self.window_size - 1, (mean - 1) // «2→1»)
= caches/pyramid/prefill.py: test_pyramid | pruned
indices = «gather_tokens(self.columns, indices)→indices».masked_fill
kept)«.masked_fill(kept < 0, -1)→»
elif not is_whole and index + 1 >«=→» state.first_pruned:
hidden_states«.masked_fill(state.columns[:, 0, :, None] < 0, 0)→»
= caches/pyramid/prefill.py: test_compile test_bad_calls | hooks
(«cache.is_compileable or →»cache.layers[0].state.num_seen > 0)
return «state.tokens is None→True» and (cache.is_compileable
= caches/pyramidkv.py: test_policies
least = «max(min(self.window_size, mean - window_size), 1)→1»
= caches/rkv.py: test_policies | redundancy
cosines.diagonal(«offset=start, →»dim1=-2, dim2=-1).zero_()
= caches/shadow_kv/host.py: test_shadow_kv | host_reads
arrives = (incoming >«=→» 0)
= caches/shadow_kv/host.py: test_small_faults
twin.tensor = «self._zeros(tuple(self.tensor.shape)).copy_(self.tensor)→self.tensor»
= caches/shadow_kv/landmarks.py: test_shadow_kv | reference
torch.cat([query, query«.abs()→» @ bands], dim=-1)
torch.cosine_similarity(chunks, means[..., None, :], dim=-1).«amin→mean»(dim=-1)
= caches/shadow_kv/layer.py: test_shadow_kv | taken_back taken alone
goes = (positions >= self.state.next_position)« | (positions < shadow)→»
(places >= 0) & (places < self.store.per_row(counts)«→ + 1»)
= caches/shadow_kv/low_rank.py: test_shadow_kv | chunks svd
gram = gram« + basis.float().mT @ gram_matrix(factors) @ basis.float()→»
= caches/shadow_kv/quantization.py: test_shadow_kv | quantised
ratio = excess.clamp(min=1).log2().«ceil→floor»().exp2()
= caches/shadow_kv/settings.py: test_small_faults
return num_chunks * self.chunk_size + self.tail_capacity - «1→2»
= caches/shadow_kv/step.py: test_shadow_kv | fixed
torch.where(self.has_shadow, positions, «views.positions→positions»)
setattr(self.state, name, «tensor.copy_(new)→tensor»)
self.cursor.fill_(state.length«→ + 1»)
= caches/shadow_kv/store.py: test_shadow_kv | alone
positions[..., : self.tail].masked_fill_(self.per_row(row_shadow) «>→<» 0, -1)
= caches/snapkv.py: test_policies
scores = view.attention«.masked_fill(is_recent, 0)→»
= caches/streaming_llm.py: test_streaming_llm test_small_faults | rows settings base longrope
masked_fill(view.positions <«→=» self.num_sink_tokens, float
else [number« - state.base→» for number in evicted]
keys = came« if state.shift is None else torch.where(state.shift > 0, state.sink_keys, came)→»
state.is_placed = «int(all(evicted))→1»
torch.full_like(view.length, «view.state.base - base→base - view.state.base»))
positions if state.base_position is None else positions« - state.base_position→»
return state.base_position is not None« or rotary.long_inv_freq is not None→»
masked_fill(is_sink, «MAX_TOKENS).argmin→-1).argmax»(dim=-1
= caches/streaming_llm.py: test_compile | one_graph nothing_moves base
angles = rotary.angles(self.from_base(state, evicted«→ - 1»))
= caches/streaming_llm.py: test_compile | end_fixed
state.shift.copy_(«evicted[..., None]→state.shift»)
if min(state.row_lengths) <= «self.num_sink_tokens + 1→0»:
return min(state.row_kept) > «self.num_sink_tokens→-1»
= caches/scissorhands.py: test_scissorhands
return (probabilities * «num_visible→9» >= 1).float()
«view.is_recent(self.num_recent)→view.is_recent(1)»
= engine/scoring.py: test_scissorhands
measured = measure(probabilities«.mean→.amax»(dim=1), is_visible
chunk = slice(start, min(start + rows_per_chunk«→ - 1», num_rows))
measured = measured * row_weights[:, «chunk→:», None]
slice(num_queries - num_rows + chunk.start, num_queries« - num_rows + chunk.stop→»)
= engine/evicting.py: test_scissorhands
return self.policy.measure(sums« / group→», num_visible) * group
= engine/store.py: test_scissorhands
return measure(sums, «(self.in_use("positions") >= 0).sum(dim=-1, keepdim=True)→self.state.next_position»)
return measure(sums, «self.state.next_position→sums.shape[-1]»)
= engine/fixed.py: test_scissorhands
num_visible = call.num_keys if mask is None else «mask.sum(dim=-1, keepdim=True)→call.num_keys»
= engine/ragged_store.py: test_scissorhands
.view(len(self.head_lengths), -1, 1) + «num_latest→0»
starts = self.starts[:: (len(self.starts) - 1) // «numbers.numel()→len(numbers)»]
= engine/ragged_step.py: test_scissorhands
num_latest = call.num_keys if mask is None else «mask.sum(dim=-1, keepdim=True)→call.num_keys»
= caches/tova.py: test_policies
view.attention«.masked_fill(view.positions >= view.length - 1, float("inf"))→»
= ops/reference.py: ops/test_scores
sink_logits.float().view(1, «kv_heads, group, 1, 1→group, kv_heads, 1, 1).transpose(1, 2»)
dtype=torch.bool, device=key.device).triu_(«1→0»)
probabilities if mask is None else probabilities«.masked_fill(~mask, 0.0)→»
= ops/lse.py: ops/test_lse
key_mask[:, None, «key_mask.shape[1] - lse.shape[2] :→: lse.shape[2]»]
= ops/packed.py: ops/test_packed
is_packed = (places < «starts[-1]→len(places)»)[:, None]
is_behind = torch.arange(longest, device="cpu") >«=→» starts.diff()[:, None, None]
logits[segment, :, : end - start] += packed_bias[«start:end→: end - start»]
= ops/shadow_reference.py: ops/test_shadow test_shadow_kv | loop alone
counts = torch.bincount(«rows * kv_heads + heads→heads * batch + rows», minlength
= ops/shadow_reference.py: ops/test_shadow
missing[..., num_places] = «-1→0»
.squeeze(3).«amax→mean»(dim=2)
= ops/registration.py: ops/test_scores | autocast
with torch.autocast(device_type, enabled=«False→True»):
= ops/triton_scores.py: ops/test_kernels
«tl.where(keys >= start, sums, 0.0)→sums»
= ops/triton_decode.py: ops/test_kernels
sums += tl.sum(«tl.where(logits == float("-inf"), 0.0, →(»tl.exp2(logits - lse[:, None])), axis=0)
logits += (bias« * LOG2E→»)[None, :]
return batch, «0 if numbers.shape[1] == 1 else →»head, slot
= ops/triton_decode.py: ops/test_packed_kernels
held_end = tl.where(is_latest, end, «begin→end»)
bias_end = tl.where(is_latest, «begin→end», end)
latest_parts + «(length + part_size - 1)→length» // part_size
= ops/triton_quantized.py: ops/test_quantized_kernels
shifts = (tl.arange(0, PARTS) * «BITS→1»).to(tl.uint8)
return runs // BLOCK_RUNS * «NUM_BYTES→RUN» + in_part * RUN
halves = ((wide & 0x80) << 8) | ((wide & «0x7F→0x78») << 7)
codes_end = tl.minimum(codes_stop, «(tl.load(starts_ptr + 1) - start).to(tl.int32)→codes_stop»)
scale_row += first // «CHANNEL_GROUP→BLOCK_N»
latest = tokens - «num_quantized→begin»
if tile < «LEAST_SLOTS→1»:
= ops/triton_shadow.py: ops/test_shadow_kernels
tl.where(quadrant >«=→» 2, -sine, sine)
"""


@dataclass(frozen=True)
class Mutation:
    """
    A fault.

    Attributes:
        file (`str`): In the package.
        old, new (`str`): What stands in it, mostly in one line, and what the fault puts there.
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
        parts = re.fullmatch("(.*)«(.*)→(.*)»(.*)", line).groups()
        before, right, wrong, after = (part.replace("¶", "\n        ") for part in parts)
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
