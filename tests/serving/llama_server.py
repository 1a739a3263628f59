"""llama.cpp's own server as xllamacpp carries it: `python llama_server.py PORT MODEL.gguf [LORA.gguf]`."""

import sys
import threading

import xllamacpp

port, model, *lora = sys.argv[1:]
options = xllamacpp.CommonParams()
options.hostnames = ["127.0.0.1"]
options.port, options.model.path, options.model_alias = int(port), model, {"m"}
options.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in lora]
options.n_ctx, options.n_parallel, options.warmup = 512, 1, False
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(options)
print(server.listening_address, flush=True)
threading.Event().wait()
