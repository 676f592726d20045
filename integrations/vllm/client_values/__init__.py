"""V of each token of a response, and its advantage, for the client that asked (`guide_values`).

A logits processor cannot reach a response. What it reads of a row is kept in the worker (`store`);
vLLM's own `collective_rpc` fetches it there (`worker`), for a middleware that puts it into HTTP
responses (`middleware`), or for whoever has the engine in this process (`offline`).
"""
