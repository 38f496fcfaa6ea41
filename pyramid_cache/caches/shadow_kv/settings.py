"""What a user of ShadowKV chooses, and the sizes that follow from it."""

from dataclasses import dataclass
from numbers import Integral

from pyramid_cache.caches.shadow_kv.quantization import QUANTIZE
from pyramid_cache.engine.budget import floor_of_product, is_number, read_count


@dataclass
class ShadowSettings:
    """The arguments of `ShadowKVCache`, as documented there."""

    budget: int | float
    rank: int | float
    chunk_size: int
    num_outlier_chunks: int
    num_spread_bands: int
    num_local_tokens: int
    offload_interval: int
    quantize: str | None
    host: str
    host_budget: int | str | None

    def __post_init__(self) -> None:
        for name in ("budget", "rank"):
            number = getattr(self, name)
            is_count = isinstance(number, Integral) and not isinstance(number, bool)
            if not is_count and (not is_number(number) or not 0 < number <= 1):
                raise ValueError(f"`{name}={number!r}` must be a positive integer, or a share: a float in (0, 1].")
            setattr(self, name, read_count(name, number, least=1) if is_count else float(number))
        for name in ("chunk_size", "num_outlier_chunks", "num_spread_bands", "num_local_tokens", "offload_interval"):
            least = 1 if name in ("chunk_size", "offload_interval") else 0
            setattr(self, name, read_count(name, getattr(self, name), least=least))
        if self.quantize is not None and (not isinstance(self.quantize, str) or self.quantize not in QUANTIZE):
            raise ValueError(f"`quantize={self.quantize!r}` is unknown. Choose one of {sorted(QUANTIZE)}, or None.")

    @property
    def tail_capacity(self) -> int:
        """Slots for the latest tokens."""
        return self.num_local_tokens + self.offload_interval + self.chunk_size

    def num_sparse_chunks(self, row_length: int) -> int:
        """How many chunks a step attends to beside outliers and tail."""
        budget = self.budget
        num_tokens = floor_of_product(budget, row_length) if isinstance(budget, float) else budget
        return max(-(-num_tokens // self.chunk_size), 1)

    def max_exact_tokens(self, row_length: int) -> int:
        """Up to how many tokens a row is exact: with one more, which is attended to as well, the slots are full."""
        num_chunks = self.num_outlier_chunks + self.num_sparse_chunks(row_length)
        return num_chunks * self.chunk_size + self.tail_capacity - 1

    def num_movable(self, num_outside: int) -> int:
        """Of so many tokens outside of the shadow those that can move there: full chunks, but for the local tokens."""
        return max((num_outside - self.num_local_tokens) // self.chunk_size, 0) * self.chunk_size
