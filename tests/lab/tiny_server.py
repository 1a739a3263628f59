"""A real HTTP server that speaks OpenAI's completions, around a tiny model: as vLLM does, or as llama.cpp's does."""

import contextlib
import json
from http.server import BaseHTTPRequestHandler

import torch

from listening import listening


@contextlib.contextmanager
def served(model, tokenizer, kind="vllm", template=None, answer=None, token=None):
    """The server's URL, and the list of the requests that it got.

    kind: "vllm" echoes prompts, "llama.cpp" does not and writes another form, "plain" gives no log-probabilities.
    answer: (status, headers, body) in place of all that. token: without it the server refuses.
    """
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, body, dict(self.headers)))
            if answer is not None:
                return self.reply(*answer)
            if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
                return self.reply(401, {}, b'{"error": {"message": "no"}}')
            if body["model"] != "mine":
                return self.reply(404, {}, b'{"error": {"message": "The model does not exist."}}')
            if self.path == "/v1/chat/completions":
                told = chat(body)
            elif self.path == "/v1/completions":
                told = complete(body)
            else:
                return self.reply(404, {}, b"{}")
            return self.reply(200, {"Content-Type": "application/json"}, json.dumps(told).encode())

        def reply(self, status, headers, body):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    def logs(ids):
        with torch.inference_mode():
            return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)

    def written(token_id):
        return tokenizer.decode([token_id])

    def item(row, token_id, count):
        best = row.topk(min(count, len(row)))
        tops = [
            {"id": int(i), "token": written(int(i)), "logprob": float(v)}
            for v, i in zip(best.values, best.indices, strict=True)
        ]
        return {"id": token_id, "token": written(token_id), "logprob": float(row[token_id]), "top_logprobs": tops}

    def complete(body):
        ids = body["prompt"]
        if isinstance(ids, str):
            ids = tokenizer(ids).input_ids
        table = logs(ids)
        best = int(table[-1].argmax())
        usage = {"prompt_tokens": len(ids)}
        count = body.get("logprobs") or 0
        if kind == "plain" or not count:
            return {"choices": [{"text": written(best)}], "usage": usage}
        if kind == "llama.cpp":
            content = [item(table[-1], best, count)]
            return {"choices": [{"text": written(best), "logprobs": {"content": content}}], "usage": usage}
        whole = [*ids, best] if body.get("echo") else [best]
        first = 0 if body.get("echo") else len(ids)
        values = [None if p == 0 else float(table[p - 1, t]) for p, t in enumerate(whole, first)]
        tops = [
            None if p == 0 else {t["token"]: t["logprob"] for t in item(table[p - 1], 0, count)["top_logprobs"]}
            for p, _ in enumerate(whole, first)
        ]
        told = {"tokens": [written(t) for t in whole], "token_logprobs": values, "top_logprobs": tops}
        return {"choices": [{"text": written(best), "logprobs": told}], "usage": usage}

    def chat(body):
        text = tokenizer.apply_chat_template(
            body["messages"], tokenize=False, add_generation_prompt=True, chat_template=template
        )
        ids = tokenizer(text, add_special_tokens=False).input_ids
        row = logs(ids)[-1]
        content = [item(row, int(row.argmax()), 5)]
        return {"choices": [{"logprobs": {"content": content}}], "usage": {"prompt_tokens": len(ids)}}

    with listening(Handler) as server:
        yield f"{server.address}/v1", asked
