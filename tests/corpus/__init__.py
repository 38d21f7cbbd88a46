"""Honest nets in the styles that people write, by which conversions are tested."""

from tests.corpus.attention import ATTENTION
from tests.corpus.cifar import CIFAR
from tests.corpus.entry import Entry
from tests.corpus.experts import EXPERTS
from tests.corpus.notebooks import NOTEBOOKS
from tests.corpus.quantised import QUANTISED
from tests.corpus.state import STATE
from tests.corpus.torchs_own import TORCHS_OWN
from tests.corpus.transformers import TRANSFORMERS

ALL: tuple[Entry, ...] = (
    *CIFAR, *TRANSFORMERS, *ATTENTION, *NOTEBOOKS, *QUANTISED, *STATE, *EXPERTS, *TORCHS_OWN,
)  # fmt: skip
"""Every net, in the order of the files."""
