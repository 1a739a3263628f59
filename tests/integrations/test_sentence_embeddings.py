"""sentence-transformers on a tiny encoder: learns, saves the adapter, and loads it as any other model."""

import numpy as np
import pytest

pytest.importorskip("sentence_transformers", reason="sentence-transformers comes with pip install '.[integrations]'")
pytestmark = pytest.mark.slow

AREAS = ["city centre", "riverside"]
FOODS = ["English", "French", "Indian", "Chinese", "Italian", "Japanese"]
NAMES = ["Blue Spice", "The Eagle", "Zizzi", "Strada", "Alimentum", "Clowns", "The Mill"]


@pytest.fixture
def facts(tmp_path):
    lines = [
        f"name : {name} | food : {food} | area : {area}||{name} serves {food} food in the {area} ."
        for area in AREAS
        for food in FOODS
        for name in NAMES
    ]
    file = tmp_path / "facts.txt"
    file.write_text("\n".join(lines))
    return file


def test_learns_saves_and_loads(example, tiny_encoder, facts, tmp_path, healthy):
    from peft import PeftModel
    from sentence_transformers import SentenceTransformer

    embedder, ndcg = example("sentence_embeddings").main(
        str(tiny_encoder), tmp_path / "out", str(facts), steps=30, held_out=20
    )
    assert ndcg["after"] > ndcg["before"]
    healthy(embedder[0].model)

    sentences = ["Zizzi serves French food .", "The Mill is in the riverside area ."]
    expected = embedder.encode(sentences)
    loaded = SentenceTransformer(str(tmp_path / "out" / "model"), device="cpu")
    assert isinstance(embedder[0].model, PeftModel)
    assert np.allclose(loaded.encode(sentences), expected, atol=1e-6)
    embedder[0].model = embedder[0].model.merge_and_unload()
    assert np.allclose(embedder.encode(sentences), expected, atol=1e-5)
    plain = SentenceTransformer(str(tiny_encoder), device="cpu")
    assert not np.allclose(plain.encode(sentences), expected, atol=1e-2)
