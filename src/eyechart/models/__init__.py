"""Opening models: hub name, local folder, GGUF file, or a catalogue that needs no hub."""

from eyechart.models.catalogue import CATALOGUE, DEFAULT_MODEL, Entry, listing
from eyechart.models.facts import ModelFacts, check_structure, facts_of, opened_with
from eyechart.models.load import load

__all__ = [
    "CATALOGUE",
    "DEFAULT_MODEL",
    "Entry",
    "ModelFacts",
    "check_structure",
    "facts_of",
    "listing",
    "load",
    "opened_with",
]
