# The server for an NVIDIA GPU host, on vLLM's own image. Build: docker build -t crane-serve .
# Run:   docker run --gpus all -p 8000:8000 -v ./masks:/masks crane-serve MODEL --masks /masks
FROM vllm/vllm-openai:v0.32.0

WORKDIR /opt/crane
COPY pyproject.toml README.md LICENSE server.py ./
COPY crane_serve crane_serve
COPY relevance relevance
COPY clients clients
# The image holds the vLLM and torch that belong together: install beside them, never over them.
ENV PIP_BREAK_SYSTEM_PACKAGES=1
RUN python3 -c "import torch; print('torch==' + torch.__version__)" > /tmp/constraints.txt \
    && python3 -m pip install --no-cache-dir --constraint /tmp/constraints.txt . \
    && rm /tmp/constraints.txt

RUN useradd --create-home --uid 10001 crane
USER crane
WORKDIR /home/crane

# Masks are served by vLLM's V1 model runner; the V2 runner is refused unless allowed.
ENV VLLM_USE_V2_MODEL_RUNNER=0

EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["crane", "serve", "--host", "0.0.0.0", "--port", "8000"]
