"""What stands behind each failure code: cause, how to check, how to mend it, and whose turn it is.

One entry per code of :data:`common.failures.KINDS`, and one per cause that never reaches a client
because Headrace deals with it by itself. A page of the runbook is named where there is one.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Explanation:
    """``checks`` are commands, ``runbook`` is the name of a page in ``ops/runbooks``."""

    cause: str
    fix: str
    checks: tuple[str, ...] = ()
    runbook: str = ""


@dataclass(frozen=True, slots=True)
class Inside:
    """A cause that ends no request by itself: what is seen of it, and what follows for clients."""

    meaning: str
    seen_as: str
    client_sees: str
    explanation: Explanation


_STATUS = "headrace status"
_DOCTOR = "headrace doctor"
_TOP = "headrace incident top"
_WHY = "headrace incident why"
_CHANGES = "headrace incident changes"
_SHOW = "headrace incident show REQUEST_ID"
_KEYS = "headrace keys list"
_MODELS = "headrace model list"

EXPLANATIONS: dict[str, Explanation] = {
    "BAD_REQUEST": Explanation(
        "A field is missing, of the wrong type or out of range, or the body is no JSON.",
        "Correct the field that the message names; GET /docs lists every field with its range.",
        (_SHOW,),
    ),
    "UNSUPPORTED_PARAMETER": Explanation(
        "The request asks for something that the API knows and Headrace does not do.",
        "Leave the named parameter out. It is refused instead of ignored, so that no answer is"
        " other than what was asked for.",
    ),
    "GRAMMAR_REJECTED": Explanation(
        "A JSON schema, regular expression or grammar is invalid, uses what is not supported, or"
        " takes more work to compile or to follow than a worker allows.",
        "Simplify it: fewer alternatives, no large repetition counts. The operator may allow more"
        " with --grammar-max-bytes and --grammar-compile-s of `headrace worker`.",
        (_SHOW,),
    ),
    "BODY_TOO_LARGE": Explanation(
        "The body has more bytes, depth or members than --payload-limit and its kin allow.",
        "Send less, or upload a file and make a batch of it. The operator may raise"
        " --payload-limit of `headrace gateway`.",
    ),
    "BODY_TIMEOUT": Explanation(
        "The body stopped coming: a slow or broken connection, or a wrong Content-Length.",
        "Send it again. Behind a proxy, look whether it buffers or cuts uploads.",
    ),
    "HEADER_TOO_LARGE": Explanation(
        "Address and headers together are larger than any SDK makes them; often a cookie.",
        "Send parameters in the body, and no cookies to the gateway's address.",
    ),
    "UNSUPPORTED_MEDIA_TYPE": Explanation(
        "The Content-Type is not application/json.",
        "Send the header Content-Type: application/json.",
    ),
    "CONTEXT_LENGTH_EXCEEDED": Explanation(
        "Prompt and new tokens together exceed the model's length, --max-total-tokens, or what"
        " the largest worker has room for. Counted at the gateway, before anything waits.",
        "Shorten the prompt or max_tokens. The operator may raise --max-total-tokens, and"
        " --max-batch-total-tokens of `headrace worker`.",
        (_SHOW,),
    ),
    "TEMPLATE_ERROR": Explanation(
        "The model's chat template refuses these messages: a role it does not know, turns out of"
        " order, tools where it has none.",
        "Change the messages as the message says. If it refuses all chats, the model's template is"
        " broken: see chat_template in its folder.",
        (_MODELS,),
    ),
    "NOT_FOUND": Explanation(
        "The path, stream, file or batch does not exist, or belongs to another tenant.",
        "Check the id, and that the API key is of the tenant that made it.",
    ),
    "METHOD_NOT_ALLOWED": Explanation(
        "The path exists, but not with this method.",
        "Use the method that the header Allow names.",
    ),
    "MODEL_NOT_FOUND": Explanation(
        "The request names a model that these gateways do not serve.",
        "Ask for a name of GET /v1/models. The operator adds models with `headrace model add`.",
        (_MODELS,),
    ),
    "ADAPTER_NOT_FOUND": Explanation(
        "The LoRA adapter was never added, was removed, or was replaced twice since.",
        "Ask for one that GET /v1/models lists, or add it with `headrace adapter add`.",
        ("headrace adapter list",),
    ),
    "ADAPTER_LOAD_FAILED": Explanation(
        "A worker could not load the adapter: damaged files, a kind that is not supported, or one"
        " made for another model.",
        "Add it again from its source with `headrace adapter add SOURCE --force`; the message says"
        " what is wrong with it.",
        ("headrace adapter list", _TOP),
    ),
    "AUTH_MISSING": Explanation(
        "Keys are asked for, and the request came without one.",
        "Send Authorization: Bearer sk-headrace-…; `headrace keys create TENANT` makes one.",
        (_KEYS,),
    ),
    "AUTH_INVALID": Explanation(
        "The key is not known to this pool: mistyped, revoked, or of another installation.",
        "Check which key the client sends (its first 24 characters are its public part), make a"
        " new one with `headrace keys create TENANT`.",
        (_KEYS,),
    ),
    "AUTH_EXPIRED": Explanation(
        "The key, or the token of the stream, is past its end.",
        "Give the key a new secret with `headrace keys rotate KEY`, or make another one.",
        (_KEYS,),
    ),
    "SCOPE_DENIED": Explanation(
        "The key may not do this: it lacks generate, batch, metrics or admin.",
        "Use a key with that scope: `headrace keys create TENANT --scope …`.",
        (_KEYS,),
    ),
    "HOST_NOT_ALLOWED": Explanation(
        "A gateway on loopback that asks for no key was called by another name than localhost: by a"
        " proxy that passes its callers' Host on, or by a web page that lets its own name point to"
        " this machine to use the gateway from a browser here.",
        "Call it as localhost. For a proxy: --allowed-hosts NAME, or make a key with"
        " `headrace keys create TENANT`.",
        (_KEYS,),
    ),
    "MODEL_NOT_ALLOWED": Explanation(
        "The key is limited to other models or adapters.",
        "Use a key that may use this model: `headrace keys create TENANT --for-model …`.",
        (_KEYS,),
    ),
    "RATE_LIMITED": Explanation(
        "The key's limit per minute, or of requests at once, is reached for the moment.",
        "Wait as Retry-After says; SDKs do so by themselves. For more, a key with higher limits.",
        (_KEYS,),
    ),
    "QUOTA_EXHAUSTED": Explanation(
        "One request needs more than the key may ever use at once, so no wait helps; or the"
        " tenant's files fill all of their room.",
        "Ask for fewer tokens, delete files, or use a key with higher limits.",
        (_KEYS,),
    ),
    "ACCESS_MISCONFIGURED": Explanation(
        "The gateway cannot check keys: its pepper is missing, is another one than the keys were"
        " made with, or Redis refuses this user what it needs.",
        "Start all gateways with the same --key-pepper or data directory; load Headrace's"
        " functions as Redis' admin with `headrace doctor --load`.",
        (_DOCTOR,),
        "redis-away",
    ),
    "IDEMPOTENCY_CONFLICT": Explanation(
        "An Idempotency-Key was used before with another body.",
        "Use a new key for each new request, the same one only to repeat a request.",
    ),
    "STREAM_EXPIRED": Explanation(
        "The stream ended longer ago than --retention-s, or lies further back than is kept.",
        "Send the request again.",
        (_SHOW,),
    ),
    "STREAM_DIVERGED": Explanation(
        "Redis lost tokens that a client had seen, together with their worker, and the new attempt"
        " chose others. It cannot happen in float32.",
        "Send the request again. If it comes often, Redis loses writes: appendonly yes, and a"
        " disk that keeps up.",
        (_DOCTOR, _SHOW),
        "redis-away",
    ),
    "BATCH_ENDED": Explanation(
        "The batch has ended, or is about to, and cannot be cancelled any more.",
        "Fetch its results with `headrace batch results BATCH_ID`.",
    ),
    "QUEUE_FULL": Explanation(
        "More work waits than the workers can do within --queue-limit-s, or than a lane may hold."
        " The request was refused before any work.",
        "Clients wait as Retry-After says. If it lasts: start more workers, or find who floods.",
        (_STATUS, "headrace incident spike", _WHY),
        "queue-age",
    ),
    "NO_WORKERS": Explanation(
        "No worker of this model has a lease in Redis: none was started, all are loading the"
        " model, all have died, or they use another Redis or model name.",
        "Start one, `headrace up` or `headrace worker`; read why the last one ended.",
        (_STATUS, _CHANGES),
        "no-workers",
    ),
    "QUEUE_TIMEOUT": Explanation(
        "The request waited for --queue-limit-s and no worker took it: too much work, or a prompt"
        " so large that no worker has had room.",
        "Send it again later; start more workers if it lasts.",
        (_STATUS, _WHY),
        "queue-age",
    ),
    "GENERATION_TIMEOUT": Explanation(
        "The generation ran for --run-limit-s. What it had made until then is in the answer.",
        "Ask for fewer tokens, or raise --run-limit-s. If steps became slow, find which worker.",
        (_SHOW, _WHY),
        "first-token-burn",
    ),
    "POISON_REQUEST": Explanation(
        "Two workers in a row died while they ran this request with others, and two more while it"
        " was on probation: nothing else had just been claimed beside it. So it is quarantined with"
        " its evidence, and no fifth is risked. (Ten deaths in all end any request.)",
        "Do not send it again. Look at what the workers said as they died, keep the bundle for"
        " whoever develops the engine. If they died of something else:"
        " `headrace dead requeue REQUEST_ID`.",
        ("headrace dead list", _SHOW, "headrace incident bundle"),
        "dead-letters",
    ),
    "MODEL_VERSION_GONE": Explanation(
        "Tokens of one model version had been shown, and its last worker went away: an update that"
        " replaced all workers at once, or a worker of another precision.",
        "Send the request again. Next time keep a worker of the old version until it has finished.",
        (_STATUS, _CHANGES),
        "no-workers",
    ),
    "PROTOCOL_TOO_NEW": Explanation(
        "A newer Headrace wrote this state; this process is of an older one.",
        "Update this process, or finish the roll-back of the others.",
        ("headrace --version", _STATUS),
    ),
    "NAN_LOGITS": Explanation(
        "The model produced numbers that are not finite: damaged weights, a precision that is too"
        " small, or hardware that computes wrongly.",
        "If one worker is named again and again, stop it and test its machine; if all are,"
        " use --dtype float32 or fetch the model anew.",
        (_WHY, _MODELS),
        "availability-burn",
    ),
    "CUDA_OOM": Explanation(
        "The device has no memory for this generation, even alone: others use it, too, or the"
        " cache is promised more than there is.",
        "Lower --cuda-memory-share or --max-batch-total-tokens; see what else runs on the device.",
        (_WHY, "nvidia-smi"),
        "availability-burn",
    ),
    "ENGINE_ERROR": Explanation(
        "The engine raised on this generation and on no other; its exception is in the log.",
        "Look at the exception; if it began with a version, go back to the one before.",
        (_SHOW, _TOP, _CHANGES),
        "availability-burn",
    ),
    "MODEL_LOAD_FAILED": Explanation(
        "The model's files are incomplete, of an architecture that is not known, or do not fit"
        " this machine. The worker ends with exit code 70.",
        "Read the message of worker.crashed; fetch the model again with"
        " `headrace model add SOURCE --force`.",
        (_MODELS, _DOCTOR),
        "no-workers",
    ),
    "WEIGHTS_MISMATCH": Explanation(
        "A file of the model has another sha256 than its manifest: damaged, or changed by hand.",
        "Fetch the model again with `headrace model add SOURCE --force`, and check the disk.",
        (_MODELS, _DOCTOR),
        "no-workers",
    ),
    "UNSAFE_FORMAT": Explanation(
        "The model brings pickle weights or code of its own, which could run anything here.",
        "Use a copy in safetensors or GGUF.",
        (_MODELS,),
    ),
    "TOKENIZER_MISMATCH": Explanation(
        "Gateway and worker hold different files under one model name.",
        "Give all of them the same model store; compare versions on every host.",
        (_STATUS, _MODELS),
    ),
    "BROKER_UNAVAILABLE": Explanation(
        "Redis does not answer: it is down, loading its data, failing over, or the network is.",
        "Start it again. What waits and runs goes on by itself once it answers.",
        (_DOCTOR, _STATUS),
        "redis-away",
    ),
    "BROKER_FULL": Explanation(
        "Redis is at its maxmemory. Running streams go on, new requests are refused.",
        "Raise maxmemory, or let less be kept: --retention-s, --lane-cap-bytes.",
        (_DOCTOR, _STATUS),
        "redis-memory",
    ),
    "STORAGE_UNAVAILABLE": Explanation(
        "The directory or bucket of --storage-url does not answer or refuses access. Only files,"
        " batches and their results need it.",
        "Check credentials, network and mount; `headrace doctor` writes and reads a test object.",
        (_DOCTOR,),
    ),
    "STORAGE_FULL": Explanation(
        "The disk of --storage-url is full.",
        "Free room, or delete files of tenants; `headrace forget TENANT` removes all of one.",
        (_DOCTOR,),
    ),
    "DRAINING": Explanation(
        "The process was told to stop and takes nothing new.",
        "Send it again: another gateway answers. Behind a proxy, let it ask /ready.",
        (_STATUS,),
    ),
    "INTERNAL": Explanation(
        "Something that nobody foresaw. Its traceback is in the log, without local values.",
        "Send it again once. Keep the bundle for the developers: each one of these is a defect.",
        (_SHOW, "headrace incident bundle"),
        "availability-burn",
    ),
}

INSIDE: dict[str, Inside] = {
    "WORKER_LOST": Inside(
        "A worker's lease ended: it was killed, or its host or network went away.",
        "job.requeued with cause lease or died, worker.state with to dead",
        "a pause; another worker goes on behind the last token",
        Explanation(
            "kill -9, out of memory, a crash, a host that stopped; exit code and signal are in"
            " process.exited.",
            "Nothing: the supervisor starts another. If it comes again and again, see the runbook.",
            (_STATUS, _CHANGES),
            "worker-lost",
        ),
    ),
    "WORKER_STALLED": Inside(
        "No step of the engine ended within --step-timeout-s, so the worker ended itself.",
        "engine.stalled; exit code 75",
        "a pause; another worker goes on behind the last token",
        Explanation(
            "A device that hangs, a machine that swaps, or a step that is too large for it.",
            "Nothing once. If it comes again: a smaller --max-step-tokens, or another machine.",
            (_STATUS, _CHANGES),
            "worker-flapping",
        ),
    ),
    "CUDA_ERROR": Inside(
        "The device's context is unusable, so the worker ended itself.",
        "engine.failed, with this code; exit code 71",
        "a pause; another worker goes on behind the last token",
        Explanation(
            "An illegal access, a device-side assertion, or faulty hardware (see GPU_HW_FAULT).",
            "Nothing once: a new process has a new context.",
            (_STATUS, "nvidia-smi"),
            "worker-flapping",
        ),
    ),
    "GPU_HW_FAULT": Inside(
        "The driver reported a fault of the GPU (an Xid).",
        "device.fault; engine.failed, with this code; exit code 71; the kernel's log: NVRM: Xid",
        "a pause; workers on other devices go on",
        Explanation(
            "Hardware, its power, its cooling or its driver.",
            "Take the host out; reset or replace the GPU as NVIDIA's Xid catalogue says.",
            ("nvidia-smi", "dmesg"),
            "worker-flapping",
        ),
    ),
    "OUTPUT_CORRUPT": Inside(
        "An answer that ended, and is no text, goes round in an endless circle, or is not what its"
        " grammar asks for.",
        "flagged in worker.finished and request.finished (invalid_utf8, repetition, grammar),"
        " headrace_outputs_flagged_total",
        "the answer as it is",
        Explanation(
            "A model that is too small for its task or sampled too hot, damaged weights, a"
            " quantization that is too coarse, or a defect of the engine.",
            "Ask once more, with another seed. If one model version or worker is named again and"
            " again, go back to the version before, or replay one on another worker.",
            (_WHY, "headrace incident replay REQUEST_ID"),
        ),
    ),
    "SLOW_CONSUMER": Inside(
        "A client reads slower than its tokens come.",
        "blocked_time and lags in request.finished, headrace_slow_consumer_drops_total",
        "nothing is lost: it is sent from the log, at its own speed",
        Explanation(
            "A slow network, or a client that does other work between two reads.",
            "Nothing at the server.",
            (_SHOW,),
        ),
    ),
    "CANCELLED_BY_CLIENT": Inside(
        "The client left or asked for the end; the slot is free within one step.",
        "request.finished with code cancelled or disconnected",
        "what it asked for",
        Explanation(
            "A closed page, a timeout of the client or of a proxy, a DELETE.",
            "Nothing. Many at one moment: look for a timeout in the proxy, or slow first tokens.",
            (_SHOW, "headrace incident spike"),
        ),
    ),
    "INCOMPLETE_GENERATION": Inside(
        "A connection ended before its stream did: its gateway died, or the network between.",
        "gateway.accepted without request.finished; process.exited of a gateway",
        "a connection that breaks, and no finish reason",
        Explanation(
            "Each generation has its end; this reader only was not told of it.",
            "Resume it on any gateway, at GET /v1/streams/{id} with Last-Event-ID: the rest"
            " follows, byte for byte.",
            (_SHOW, "headrace incident verify"),
            "gateway-away",
        ),
    ),
    "LOG_SINK_BLOCKED": Inside(
        "Nobody reads the pipe of standard output, so lines are dropped and counted.",
        "log.dropped, headrace_log_lines_dropped_total",
        "nothing: serving never waits for its log",
        Explanation(
            "A log collector that stands still or is too slow.",
            "Start the collector again, or write to files with --log-dir.",
            ("headrace incident verify",),
            "log-drops",
        ),
    ),
    "DISK_FULL": Inside(
        "The disk with the logs has no room, so lines are dropped and counted.",
        "log.dropped, headrace_log_lines_dropped_total",
        "nothing, until storage or Redis need that disk, too",
        Explanation(
            "Old logs, models that nobody uses, or the embedded server's data.",
            "Free room; `headrace doctor` says how much there is.",
            (_DOCTOR,),
            "log-drops",
        ),
    ),
    "WEBHOOK_UNDELIVERABLE": Inside(
        "A receiver took no delivery for 72 hours, or answered 410.",
        "webhook.dead",
        "it has to ask for its batch by itself",
        Explanation(
            "An address that is wrong, a receiver that is down or refuses the signature.",
            "Mend the receiver, then `headrace webhooks resend DELIVERY_ID`.",
            ("headrace webhooks dead",),
        ),
    ),
}
"""Causes by the name that the field uses for them; none of them is the code of an answer."""

SAID_AS: dict[str, str] = {
    "LOAD_SHED": "QUEUE_FULL",
    "STREAM_FORBIDDEN": "NOT_FOUND",
    "STREAM_TRIMMED": "STREAM_EXPIRED",
    "BROKER_READONLY_FAILOVER": "BROKER_UNAVAILABLE",
    "INVALID_API_KEY": "AUTH_INVALID",
    "RATE_LIMIT_EXCEEDED": "RATE_LIMITED",
    "INSUFFICIENT_QUOTA": "QUOTA_EXHAUSTED",
}
"""Names that other servers and OpenAI use, by ours."""
