"""Papers are cited by authors and year, everywhere alike."""

from __future__ import annotations

import re

import pytest

from localize import methods, recipes
from localize.recipes.citations import cited


@pytest.mark.parametrize(
    ("reference", "short"),
    [
        ("G. Hinton. The forward-forward algorithm: some preliminary investigations. 2022.", "Hinton 2022"),
        ("H.-C. Lee, J. Song. SymBa: symmetric learning. 2023. arXiv 2303.08418.", "Lee & Song 2023"),
        ("A. Nøkland, L. H. Eidnes. Local error signals. ICML 2019.", "Nøkland & Eidnes 2019"),
        ("D. E. Rumelhart, G. E. Hinton, R. J. Williams. Learning. Nature 323, 1986.", "Rumelhart et al. 1986"),
        ("S. Choi, M. Jeon, Y. Hwang. Dictionary contrastive learning. ICLR 2024.", "Choi et al. 2024"),
        ("A. van den Oord, Y. Li and O. Vinyals. Coding. 2018.", "van den Oord et al. 2018"),
        ("Ö. Çelik & É. Noël. Titre. 2020.", "Çelik & Noël 2020"),
        ("Learning using label embeddings. 2023, anonymous preprint.", "anonymous 2023"),
        ("G. Hinton. A title without a year.", "Hinton"),
        ("Deep learning. A book.", "anonymous"),
    ],
)
def test_a_paper_is_cited_by_authors_and_year(reference: str, short: str) -> None:
    assert cited(reference) == short


@pytest.mark.parametrize("name", methods.names())
def test_a_method_and_its_recipe_cite_the_same(name: str) -> None:
    paper = recipes.load(name).paper

    assert re.fullmatch(r".+ \d{4}", cited(methods.get(name).reference))
    assert not paper or cited(paper) == cited(methods.get(name).reference)
