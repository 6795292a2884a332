"""Pages that open offline: a template, what it shows, and sound inside the file."""

import base64
import io
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

import jinja2
import soundfile as sf

from speechalign.rows import waveform_from_pcm


def write_page(template: str, values: Mapping[str, object], path: Path) -> None:
    """Write a page, whole or not at all.

    Args:
        template: a file of this folder.
        values: what it is filled with; text is escaped.
        path: where the page goes.
    """
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    source = (files("speechalign.evaluation") / template).read_text()
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(environment.from_string(source).render(values))
    partial.replace(path)


def sound_url(pcm: bytes, sample_rate_hz: int) -> str:
    """Return the URL of a sound that is inside the page, as FLAC."""
    buffer = io.BytesIO()
    sf.write(buffer, waveform_from_pcm(pcm), sample_rate_hz, format="FLAC")
    return "data:audio/flac;base64," + base64.b64encode(buffer.getvalue()).decode()
