"""Analyses of what the layers of trained runs have learned, as numbers and pictures. All of them stream the data.

::

    run, other = localize.load("runs/dcl"), localize.load("runs/backprop")
    found = localize.analysis.confusion(run)
    found.by["loss_0"]  # (Z, Z): number of images of class i that this loss predicts as class j
    localize.analysis.probe(run)[0].test_accuracy
    localize.analysis.cka(run, other).values
    localize.analysis.save(found, Path("confusion.svg"))  # with matplotlib
"""

from localize.analysis.confusions import Confusion, confusion
from localize.analysis.costs import Costs, cost
from localize.analysis.curves import Convergence, convergence
from localize.analysis.embeddings import Labels, labels
from localize.analysis.estimates import Information, information
from localize.analysis.figures import save
from localize.analysis.kernels import CKA, cka
from localize.analysis.maps import Features, Saliency, features, saliency
from localize.analysis.planes import Neighbours, neighbours
from localize.analysis.probes import Probe, probe

__all__ = [
    "CKA",
    "Confusion",
    "Convergence",
    "Costs",
    "Features",
    "Information",
    "Labels",
    "Neighbours",
    "Probe",
    "Saliency",
    "cka",
    "confusion",
    "convergence",
    "cost",
    "features",
    "information",
    "labels",
    "neighbours",
    "probe",
    "saliency",
    "save",
]
