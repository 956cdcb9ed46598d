"""One forward pass with probes attached."""

from eyechart.probes.branching import why_not_branching
from eyechart.probes.capture import capture
from eyechart.probes.kept import Observations
from eyechart.probes.probe import Look, Probe, Record
from eyechart.probes.sites import SITES, Site, has_site, hook_names
from eyechart.probes.stream import StreamProbe, depth_labels

__all__ = [
    "SITES",
    "Look",
    "Observations",
    "Probe",
    "Record",
    "Site",
    "StreamProbe",
    "capture",
    "depth_labels",
    "has_site",
    "hook_names",
    "why_not_branching",
]
