"""Encode the corpus: `python -m speechalign.codec.encode_corpus CORPUS CODEC GOLDEN.parquet`.

Clips without a text, which only the codec's training needed, are left out.

Shapes: B batch, F frames of 10 ms, T frames of 20 ms, K codebooks.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from speechalign.codec.crops import Corpus, equal_length_batches
from speechalign.codec.embedded import EmbeddedCodec
from speechalign.config.codec import EncodeCorpusConfig
from speechalign.rows import GOLDEN

logger = logging.getLogger(__name__)


def encode_corpus(config: EncodeCorpusConfig) -> Path:
    """Write the golden codes of every clip with a text; return the file.

    Raises:
        ConfigError: if there is no codec.
        CorruptArtifact: if the codec or the corpus is damaged.
    """
    torch.set_num_threads(config.num_threads)
    corpus = Corpus.read(config.corpus_dir)
    codec = EmbeddedCodec.load(config.codec_dir)
    has_text_C = np.array([bool(text) for text in corpus.clips["text"].to_pylist()])
    codes = _encode(corpus, codec, np.flatnonzero(has_text_C), num_levels=config.num_levels)
    kept = corpus.clips.filter(pa.array(has_text_C))
    columns: dict[str, Any] = {
        field.name: kept[field.name].cast(field.type)
        for field in GOLDEN
        if field.name in kept.column_names
    }
    columns["codes"] = pa.array(codes, type=GOLDEN.field("codes").type)
    columns["codec_fingerprint"] = pa.array([codec.fingerprint] * len(kept), type=pa.string())
    table = pa.table([columns[name] for name in GOLDEN.names], schema=GOLDEN)
    unfinished = config.out_file.with_name(f".{config.out_file.name}.partial")
    pq.write_table(table, unfinished, compression="zstd", compression_level=19)
    unfinished.replace(config.out_file)
    logger.info("%s: %d clips of %d", config.out_file, len(table), len(corpus.clips))
    return config.out_file


def _encode(
    corpus: Corpus, codec: EmbeddedCodec, chosen_C: NDArray[np.int64], *, num_levels: int
) -> list[NDArray[np.int16]]:
    flat: dict[int, NDArray[np.int16]] = {}
    for batch in equal_length_batches(corpus.num_frames_C[chosen_C]):
        clips = chosen_C[batch]
        features_BFD = np.stack([corpus.clip_features(clip) for clip in clips])
        codes_KBT = codec.model.encode(torch.from_numpy(features_BFD).float()).numpy()
        for index, clip in enumerate(clips.tolist()):
            flat[clip] = codes_KBT[:num_levels, index].reshape(-1).astype(np.int16)
    empty = np.zeros(0, np.int16)  # a clip shorter than a frame
    return [flat.get(clip, empty) for clip in chosen_C.tolist()]


def main(arguments: Sequence[str]) -> None:
    """Encode the corpus that the command line names."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    corpus_dir, codec_dir, out_file = (Path(argument) for argument in arguments)
    encode_corpus(EncodeCorpusConfig(corpus_dir=corpus_dir, codec_dir=codec_dir, out_file=out_file))


if __name__ == "__main__":
    main(sys.argv[1:])
