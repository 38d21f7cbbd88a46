"""What the layers of trained runs have learned, as numbers; everything streams over the data.

::

    run = localize.load("runs/resnet20-dcl-digits-seed0")
    found = localize.analysis.confusion(run)
    found.by["loss_0"]  # (Z, Z): images of class i that this loss takes for class j
    localize.analysis.probe(run)[0].test_accuracy
    localize.analysis.cka(run, localize.load("runs/resnet20-backprop-digits-seed0")).values
"""

from localize.analysis.confusions import Confusion, confusion
from localize.analysis.kernels import CKA, cka
from localize.analysis.probes import Probe, probe

__all__ = ["CKA", "Confusion", "Probe", "cka", "confusion", "probe"]
