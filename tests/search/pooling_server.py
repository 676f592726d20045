"""A pooling server that answers as vLLM does, with the stock forward of a model in this process."""

import threading

import torch

from tests.search.scripted_server import Reply

_LOCK = threading.Lock()  # a model's forward is one thread's at a time


class PoolingServer:
    """The script of a `ScriptedServer`. task: that it serves. name, root, most: of its model.
    activation: whether it heeds use_activation, else what it does. pool: of a "classify" server."""

    def __init__(self, model, task="token_classify", *, name="critic", root=None, most=None,
                 activation=None, pool="last"):  # fmt: skip
        self.model, self.task, self.name = model, task, name
        self.root = root or model.config.name_or_path
        self.most, self.activation, self.pool = most, activation, pool
        self.texts = []

    def __call__(self, path, body, number):
        if path == "/v1/models":
            own = {"id": self.name, "root": self.root, "max_model_len": self.most}
            return {"object": "list", "data": [own]}
        if path != "/pooling":
            return Reply({"detail": "Not Found"}, status=404)
        if body["model"] != self.name:
            return Reply({"error": {"message": f"no {body['model']}"}}, status=404)
        if body["task"] != self.task:
            said = f"Try switching the model's pooling_task via --pooler-config.task {body['task']}"
            return Reply({"error": {"message": said}}, status=400)
        ids = body["input"]
        self.texts.append(tuple(ids))
        outputs = self.outputs(ids, body["use_activation"])
        data = outputs if self.task == "token_classify" else outputs[-1]
        return {
            "object": "list",
            "model": self.name,
            "data": [{"index": 0, "object": "pooling", "data": data}],
            "usage": {"prompt_tokens": len(ids), "total_tokens": len(ids)},
        }

    def outputs(self, ids, activation):
        with _LOCK, torch.inference_mode():
            hidden = self.model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
            raw = self.model.score(hidden)
        if self.pool == "first":
            raw = raw[:1].expand(len(ids), -1)
        active = activation if self.activation is None else self.activation
        if active:
            raw = raw.sigmoid() if raw.shape[-1] == 1 else raw.softmax(-1)
        return raw.tolist()
