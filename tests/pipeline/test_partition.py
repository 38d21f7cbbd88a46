"""A step shared out to ranks: who computes what, what crosses, what is refused, and that nothing else has changed."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import localize
from localize.auditor.ranks import CLAIMS, check_ranks
from localize.cli import app
from localize.errors import MethodError, OptionError
from localize.estimate.memory import predict
from localize.ir import Message
from localize.pipeline import partition
from localize.pipeline.costs import costs, needed
from localize.pipeline.texts import arrivals, texts
from localize.pipeline.together import compared
from localize.pipeline.units import units
from localize.runtime.model import LocalModel
from tests.nets import ALL

X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 5


def made(net: str, method: str, **options: object) -> LocalModel:
    torch.manual_seed(0)
    return localize.transform(ALL[net](), method, example_input=X, **options)


@pytest.fixture(scope="module")
def local() -> LocalModel:
    return made("ResNet", "dcl-ld")


EXACT = [
    ("TwoStreams", "feat", {}),
    ("ViT", "ll-bpf", {}),
    ("ResNet", "dcl-s", {}),
    ("ResNet", "dcl-o", {"delay": 1}),
    *(
        pytest.param(net, method, {}, marks=pytest.mark.slow)
        for net, method in [
            ("ResNet", "dgl"), ("TwoStreams", "dgl"), ("ViT", "auglocal"), ("ResNet", "infopro"), ("ResNet", "ff"),
            ("ResNet", "drtp"), ("ResNet", "symba"),
            ("ResNet", "cafo"), ("ResNet", "predsim"), ("ViT", "ll-cont"), ("ViT", "ll-contrec"), ("ViT", "feat"),
            ("ResNet", "cfl"), ("ResNet", "infopro-softmax"),
        ]
    ),
]  # fmt: skip


@pytest.mark.parametrize(("net", "method", "options"), EXACT)
def test_ranks_together_are_the_one_process_step_bit_for_bit(net: str, method: str, options: dict[str, object]) -> None:
    """Also where a net draws random numbers, hands on two tensors, or a later loss reads the images."""
    step = made(net, method, **options)
    shared = partition(step, 2)

    checks = (*check_ranks(step, texts(step, shared)), *compared(step, shared, (X, Y)))

    assert all(check.ok for check in checks), [check.evidence for check in checks if not check.ok]


LATE = 'stream.receive_delayed("heads.dictionary", heads.dictionary, source=1)'


@pytest.mark.parametrize(
    ("rank", "old", "new", "said"),
    [
        (0, f"    {LATE}\n", "", "what is sent to earlier ranks is not what they read"),
        (0, f"    {LATE}\n", f"    {LATE}\n    x_1 = x_1.detach()\n", "does not pull its copy"),
        (0, "heads.delayed_dictionary())", "heads.dictionary())", "rank 0 reads heads.dictionary in step_0"),
        (1, "heads.dictionary", "heads.head_3", "sends heads.head_3 to rank 0, and no copy is declared"),
    ],
)  # fmt: skip
def test_what_goes_back_is_a_declared_value_of_the_batch_before(rank: int, old: str, new: str, said: str) -> None:
    step = made("ResNet", "dcl-o", delay=1)
    shared = partition(step, 2)
    sources = texts(step, shared)
    if rank == 1:
        line = 'stream.send_delayed("heads.dictionary", heads.dictionary, to=0)'
        assert sources[1].index(line) < sources[1].index("x_1 = stream.receive")
        sources[1] = sources[1].replace(line, line.replace(old, new))
        sources[0] = sources[0].replace(LATE, LATE.replace(old, new))
    else:
        assert old in sources[0]
        sources[0] = sources[0].replace(old, new)

    delayed = next(check for check in check_ranks(step, sources) if check.id == "ranks.delayed")

    assert not delayed.ok
    assert said in delayed.evidence


def test_a_value_that_goes_back_after_a_step_of_its_batch_is_seen() -> None:
    step = made("ResNet", "dcl-o", delay=1)
    shared = partition(step, 2)
    sources = texts(step, shared)
    line = '    stream.send_delayed("heads.dictionary", heads.dictionary, to=0)\n'
    sources[1] = sources[1].replace(line, "").replace("    optimizer.step()\n", f"    optimizer.step()\n{line}")

    delayed = next(check for check in check_ranks(step, sources) if check.id == "ranks.delayed")

    assert "rank 1 sends heads.dictionary after a step of this batch" in delayed.evidence


def test_a_dictionary_that_is_not_delayed_would_flow_backward() -> None:
    with pytest.raises(MethodError, match="it would have to flow backward"):
        partition(made("ResNet", "dcl-o"), 3)


def test_every_cut_of_a_step_gives_the_same_weights(local: LocalModel) -> None:
    assert all(check.ok for check in compared(local, partition(local, [0, 1, 2, 3]), (X, Y)))


def test_a_difference_between_ranks_and_the_step_is_seen(local: LocalModel) -> None:
    shared = partition(local, 2)
    sources = texts(local, shared)
    changed = sources[1].replace("loss_3.backward()", "(2.0 * loss_3).backward()")
    assert changed != sources[1]
    sources[1] = changed

    _, together = compared(local, shared, (X, Y), sources)

    assert not together.ok
    assert "differs" in together.evidence


def test_functions_of_a_rank_are_those_of_the_step_byte_for_byte(local: LocalModel) -> None:
    shared = partition(local, 3)
    whole = _functions(local.source)
    found = [_functions(text) for text in texts(local, shared)]

    for one in found:
        assert all(text == whole[name] for name, text in one.items() if name != "train_step")
    names = list(itertools.chain(*(sorted(one.keys() - {"train_step"}) for one in found)))
    assert sorted(names) == sorted(whole.keys() - {"train_step"}), "each in one rank"


def _functions(text: str) -> dict[str, str]:
    parts = re.split(r"\n\n\n(?=def )", text.rstrip("\n"))[1:]
    return {re.match(r"def (\w+)", part).group(1): part for part in parts}


def test_a_driver_receives_runs_and_sends(local: LocalModel) -> None:
    shared = partition(local, [0, 1, 3])

    driver = _functions(texts(local, shared)[1])["train_step"]

    lines = [line.strip() for line in driver.splitlines()]
    assert lines[0] == "def train_step(trunk, heads, y, optimizer, stream):"
    assert lines[2:9] == [
        "optimizer.zero_grad()",
        'x_1 = stream.receive("x_1", source=0)',
        "x_2, loss_1, scores_1 = step_1(trunk, heads, x_1, y, optimizer)",
        "del x_1",
        "x_3, loss_2, scores_2 = step_2(trunk, heads, x_2, y, optimizer)",
        "del x_2",
        'stream.send("x_3", x_3, to=2)',
    ]
    assert arrivals(local, shared, 1) == [(0, "x_1")]


def test_messages_say_what_crosses_and_how_large_it_is(local: LocalModel) -> None:
    shared = partition(local, [0, 3])

    assert shared.messages == (Message("x_3", 0, 1, (8, 4, 4), 1, torch.float32),)
    assert shared.messages[0].bytes_of(64) == 64 * 8 * 4 * 4 * 4
    assert [stage.images for stage in shared.stages] == [True, False]


def test_streams_and_two_tensors_cross_as_they_are() -> None:
    two = partition(made("TwoStreams", "feat"), [0, 3])
    assert [message.name for message in two.messages] == ["x_3_0", "x_3_1"]
    assert partition(made("ResNet", "ff"), 2).messages[0].rows == 3


def test_the_largest_part_is_the_least(local: LocalModel) -> None:
    best = max(stage.cost for stage in partition(local, 2).stages)

    others = [max(stage.cost for stage in partition(local, [0, start]).stages) for start in (1, 2, 3)]

    assert best == min(others) < max(others)


def test_every_tensor_is_kept_by_one_rank(local: LocalModel) -> None:
    stages = partition(local, 3).stages
    kept = [name for stage in stages for name in stage.tensors]

    assert sorted(kept) == sorted(name for name, _ in (*local.named_parameters(), *local.named_buffers()))
    assert not any(stage.copied for stage in stages)


def test_what_is_fixed_is_on_every_rank_that_reads_it() -> None:
    stages = partition(made("ResNet", "dcl-s"), 2).stages
    assert stages[1].copied == ("heads.dictionary.weight",) or all("dictionary" in n for n in stages[1].copied)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ("dcl", "dictionary is trained by loss_0 to loss_2: two ranks would train it."),
        ("dcl-o", "dictionary is trained by loss_3? and read by loss_0.*: it would have to flow backward."),
        ("backprop", "one loss, whose gradient flows back"),
        ("dfa", "wait for the error of the output"),
        ("accumulate", "segment_0 is trained by loss_0 to loss_3: two ranks would train it."),
    ],
)
def test_what_would_flow_backward_is_refused_with_the_reason(method: str, why: str) -> None:
    with pytest.raises(MethodError, match=why.replace("loss_3?", "loss_\\d")):
        partition(made("ResNet", method), 4)


def test_stages_by_hand_are_checked(local: LocalModel) -> None:
    with pytest.raises(OptionError, match="0 is the first"):
        partition(local, [1, 2])
    with pytest.raises(OptionError, match="ascending order, of which there are 4"):
        partition(local, [0, 4])
    with pytest.raises(MethodError, match=r"begin with loss 1.\n  dictionary is trained .*\n.*begin with 0, 3"):
        partition(made("ResNet", "dcl"), [0, 1])


def test_a_rank_drops_values_that_it_reads_no_more(local: LocalModel) -> None:
    first = texts(local, partition(local, [0, 3]))[0]

    driver = first[first.index("def train_step") :]
    assert re.search(r"step_1\(trunk, heads, x_1, .*\n    del x_1\n", driver), driver


def test_a_rank_needs_what_its_losses_leave_and_compute() -> None:
    local = made("ResNet", "dgl")
    spent = costs(local, units(local), 8)
    whole = predict(local, 8)

    weights = sum(p.nbytes for p in (*local.parameters(), *local.buffers()))
    assert max(one.peak for one in spent) + whole.components["result"] == whole.peak
    assert spent[0].before > weights, "weights and the optimizer's state live before"
    assert needed(spent[2:]) < needed(spent) == whole.peak - whole.components["result"] - spent[0].before


def test_a_limit_of_memory_moves_the_cut_or_is_said_not_to_suffice(local: LocalModel) -> None:
    free = partition(local, 2)
    with pytest.raises(OptionError, match=r"does not fit on 2 ranks of 1,000 bytes.\n.*needs [\d,]+ bytes"):
        partition(local, 2, memory=1000)
    with pytest.raises(OptionError, match="rank 0 of these stages needs"):
        partition(local, [0, 2], memory=1000)
    assert partition(local, 2, memory=2**30) == free


SABOTAGE = {
    "ranks.functions": lambda one, two: (one.replace("loss_0.backward()", "loss_0.detach()", 1), two),
    "ranks.forward": lambda one, two: (one, two.replace("source=0", "source=1")),
    "ranks.detached": lambda one, two: (
        one.replace("x_2, loss_1, scores_1 = step_1(", "loss_1, x_2, scores_1 = step_1(").replace(
            "stream.send(", "x_2 = x_2 + 0\n    stream.send("
        ),
        two,
    ),
    "ranks.apart": lambda one, two: (one, two + "\n\ndef extra(trunk):\n    return trunk.blocks[0].conv1\n"),
    "ranks.delayed": lambda one, two: (
        one,
        two.replace(
            "    x_2 =", '    stream.send_delayed("heads.dictionary_0", heads.dictionary_0, to=0)\n    x_2 =', 1
        ),
    ),
    "ranks.together": lambda one, two: (one, two.replace(" = step_3(trunk, heads, x_3", " = step_3(trunk, heads, x_2")),
}  # fmt: skip


@pytest.mark.parametrize("id", CLAIMS)
def test_a_rank_that_does_something_else_is_found_out(id: str, local: LocalModel) -> None:
    one, two = texts(local, partition(local, [0, 2]))
    changed = SABOTAGE[id](one, two)
    assert changed != (one, two)

    failed = {check.id for check in check_ranks(local, changed) if not check.ok}

    assert id in failed, failed


def test_a_detach_that_is_left_out_is_found_out(local: LocalModel) -> None:
    broken = local.with_source(local.source.replace("return h_1.detach(), ", "return h_1, "))
    shared = partition(local, [0, 2])
    sources = [text.replace("return h_1.detach(), ", "return h_1, ") for text in texts(local, shared)]

    assert [check.id for check in check_ranks(broken, sources) if not check.ok] == ["ranks.detached"]


def test_convert_writes_a_text_for_each_rank(tmp_path: Path) -> None:
    words = ["convert", "fc_mnist", "--method", "feat", "--stages", "2", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)

    assert done.exit_code == 0, done.output
    assert "together the ranks equal the step, bit for bit" in done.output
    told = json.loads((tmp_path / "out" / "partition.json").read_text())
    assert [one["rank"] for one in told["ranks"]] == [0, 1]
    assert "stream.send(" in (tmp_path / "out" / "rank_0.py").read_text()
    assert CliRunner().invoke(app, [*words, "--force"]).exit_code == 0
    assert CliRunner().invoke(app, ["convert", "fc_mnist", "--method", "feat", "--stages", "one"]).exit_code == 2
