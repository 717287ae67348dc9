from __future__ import annotations

from pathlib import Path

from cluster.checkpoints import locate
from tests.builders import a_shape, a_variant


def test_a_link_is_not_followed_as_other_parts_of_a_model_lie_beside_it(
    tmp_path: Path,
) -> None:
    """As in Hugging Face's cache, whose files are called by their checksums."""
    (tmp_path / "blob").touch()
    (tmp_path / "m-00001-of-00002.gguf").symlink_to(tmp_path / "blob")
    first = tmp_path / "m-00001-of-00002.gguf"

    located = locate(a_variant(shape=a_shape(engine="llamacpp"), checkpoint=str(first)))

    assert located == first
