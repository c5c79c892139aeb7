# Two targets: `gpu` (the default) on vLLM's own image for NVIDIA GPUs, and `cpu` with vLLM's CPU build.
#   docker build -t crane-serve .                      docker build -t crane-serve:cpu --target cpu .
#   docker run --gpus all -p 8000:8000 -e CRANE_ADMIN_KEY -v ./masks:/masks -v crane-models:/models crane-serve MODEL
# docs/deployment/gpu-host.md has the rest. No layer holds a key: keys come at run time, from a file or the environment.
ARG VLLM_VERSION=0.32.0
# To be sure of a base, name it by its digest: --build-arg CPU_BASE=debian:bookworm-slim@sha256:...
ARG CPU_BASE=debian:bookworm-slim
ARG GPU_BASE=vllm/vllm-openai:v${VLLM_VERSION}

FROM scratch AS source
COPY pyproject.toml README.md LICENSE server.py /
COPY crane_serve /crane_serve
COPY relevance /relevance
COPY clients /clients
COPY deploy/constraints.py /deploy/constraints.py
COPY deploy/locks/cpu.txt /deploy/locks/cpu.txt


FROM ${CPU_BASE} AS cpu
ARG VERSION=0.1.0
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# torch.compile needs a compiler and Python's headers at run time, vLLM libnuma.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ libnuma1 python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
# Every file is one of those whose hashes are in the lock (`make lock`). torch's build for CPUs is not on PyPI; a mirror may
# have it. vLLM also asks for torchvision, torchaudio, torchcodec, Triton and OpenCV, which it does not use for text on a CPU:
# the lock has none of them.
COPY --from=source /deploy/locks/cpu.txt /opt/cpu.txt
RUN sed -n '/^torch==/,/[^\\]$/p' /opt/cpu.txt > /opt/torch.txt \
    && { python3 -m pip install --no-cache-dir --no-deps --require-hashes -r /opt/torch.txt \
        || python3 -m pip install --no-cache-dir --no-deps --require-hashes --index-url "$TORCH_INDEX" -r /opt/torch.txt; } \
    && python3 -m pip install --no-cache-dir --no-deps --require-hashes -r /opt/cpu.txt
COPY --from=source / /opt/crane/
RUN python3 -m pip install --no-cache-dir --no-deps --no-index --no-build-isolation /opt/crane
# Volumes that are made from these directories belong to the user, too.
RUN useradd --create-home --uid 10001 crane \
    && install -d -o crane -g crane /masks /models /home/crane/.cache
# Compiled code is loaded from the cache: a /tmp of Docker's --tmpfs lets nothing be run.
ENV HOME=/home/crane \
    CRANE_HOST=0.0.0.0 \
    CRANE_PORT=8000 \
    CRANE_MASKS=/masks \
    HF_HOME=/models \
    XDG_CACHE_HOME=/home/crane/.cache \
    TORCHINDUCTOR_CACHE_DIR=/home/crane/.cache/torchinductor \
    MPLCONFIGDIR=/home/crane/.cache/matplotlib \
    VLLM_NO_USAGE_STATS=1
LABEL org.opencontainers.image.title="crane-serve" \
      org.opencontainers.image.description="Serve a model so that any single request can run with a language switched off; CPU build of vLLM." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION"
USER 10001:10001
WORKDIR /home/crane
VOLUME ["/masks", "/models"]
EXPOSE 8000
# The server drains on SIGTERM for CRANE_DRAIN_TIMEOUT_S (30): give `docker stop` a minute (-t 60).
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/ready'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["crane", "serve"]


FROM ${GPU_BASE} AS gpu
ARG VERSION=0.1.0
USER 0:0
ENV PIP_BREAK_SYSTEM_PACKAGES=1
# torch, CUDA's libraries and vLLM stay as they are, and what vLLM requires holds.
COPY --from=source / /opt/crane/
RUN python3 /opt/crane/deploy/constraints.py torch > /opt/crane/constraints.txt \
    && python3 -m pip install --no-cache-dir --constraint /opt/crane/constraints.txt "/opt/crane[cuda]"
# Volumes that are made from these directories belong to the user, too.
RUN useradd --create-home --uid 10001 crane \
    && install -d -o crane -g crane /masks /models /home/crane/.cache
ENV CRANE_HOST=0.0.0.0 \
    CRANE_PORT=8000 \
    CRANE_MASKS=/masks \
    HOME=/home/crane \
    HF_HOME=/models \
    XDG_CACHE_HOME=/home/crane/.cache \
    TORCHINDUCTOR_CACHE_DIR=/home/crane/.cache/torchinductor \
    TRITON_CACHE_DIR=/home/crane/.cache/triton \
    CUDA_CACHE_PATH=/home/crane/.cache/nv \
    MPLCONFIGDIR=/home/crane/.cache/matplotlib \
    VLLM_NO_USAGE_STATS=1
LABEL org.opencontainers.image.title="crane-serve" \
      org.opencontainers.image.description="Serve a model so that any single request can run with a language switched off; for NVIDIA GPUs." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="$VERSION"
USER 10001:10001
WORKDIR /home/crane
VOLUME ["/masks", "/models"]
EXPOSE 8000
# The server drains on SIGTERM for CRANE_DRAIN_TIMEOUT_S (30): give `docker stop` a minute (-t 60).
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/ready'); raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["crane", "serve"]
