# The service with the bundled model, on CPUs, for clients on this machine, without keys (docs/security.md):
#   docker build -t iddpm . && docker run -e IDDPM_ALLOW_KEYLESS=true -p 127.0.0.1:8000:8000 iddpm
# With keys: docker run -e IDDPM_KEYS_FILE=/keys/keys.json -v "$PWD/deploy/keys:/keys:ro" ...
# Only loopback names are accepted in the Host header; for other names: docker run -e IDDPM_ALLOWED_HOSTS=name,name ...
# It serves artifacts (iddpm export) and has no torch. EXTRA=torch adds it, to serve checkpoints too; where
# `pip install torch` installs CUDA packages (gigabytes), pass an index with CPU wheels:
#   docker build --build-arg EXTRA=torch --build-arg PIP_EXTRA_INDEX_URL=... -t iddpm .

FROM python:3.11-slim AS build
ARG PIP_EXTRA_INDEX_URL
ARG EXTRA=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The environment copied below has no pip: pip of the base image installs into it.
RUN python -m venv --without-pip /opt/iddpm
WORKDIR /src
# Dependencies first, in a layer that stays cached when the code changes.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip --python /opt/iddpm/bin/python install -c constraints.txt ".${EXTRA:+[$EXTRA]}"
COPY cli cli
COPY diffusion diffusion
COPY formats formats
COPY interchange interchange
COPY trainer trainer
COPY model_export model_export
COPY service service
# Torch's headers and test programs (145 MB) are only used with a compiler, which the image does not have.
RUN pip --python /opt/iddpm/bin/python install --no-deps --force-reinstall . \
    && rm -rf /opt/iddpm/lib/python3.*/site-packages/torch/include /opt/iddpm/lib/python3.*/site-packages/torch/test

# For NVIDIA GPUs: docker build --target gpu -t iddpm-gpu .     pip's index must have torch with CUDA (PyPI has)
# With TensorRT: --build-arg GPU_EXTRA=tensorrt (data-centre GPUs) or GPU_EXTRA=tensorrt-rtx (RTX cards); both include torch
FROM build AS build-gpu
ARG GPU_EXTRA=torch
RUN pip --python /opt/iddpm/bin/python install -c constraints.txt ".[$GPU_EXTRA]"

FROM python:3.11-slim AS base
RUN useradd --system --uid 10001 --no-create-home iddpm
# Owned by the user that serves it, so that a checkout with a strict umask works too.
COPY --chown=10001:10001 models/fashion32 /models/fashion32
ENV PATH=/opt/iddpm/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp
# The commit is known to the one who builds: docker build --label org.opencontainers.image.revision="$(git rev-parse HEAD)" ...
LABEL org.opencontainers.image.title="iddpm" \
    org.opencontainers.image.description="Inference service for class-conditional pixel-space diffusion models" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.licenses="Apache-2.0"
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Liveness, not readiness: start-up and draining must not cause a restart. http.client, because urllib would use a proxy.
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=3 CMD ["python", "-c", \
    "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/healthz'); \
    raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["iddpm"]
CMD ["serve", "--model", "/models/fashion32", "--host", "0.0.0.0", "--port", "8000"]

FROM base AS gpu
USER 0
# Triton compiles the launcher of each kernel, torch.compile also C++. The headers of Python are in the base image.
# hadolint ignore=DL3008  # a pinned version of g++ disappears from Debian with the next fix
RUN apt-get update && apt-get install -y --no-install-recommends g++ libc6-dev && rm -rf /var/lib/apt/lists/* \
    && install -d -o 10001 -g 10001 /cache
COPY --from=build-gpu /opt/iddpm /opt/iddpm
# Compiled kernels are loaded from here, and engines are built here: it must be writable and allow execution, which a tmpfs
# of docker does not.
ENV TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/inductor CUDA_CACHE_PATH=/cache/cuda \
    IDDPM_CACHE_DIR=/cache/openvino IDDPM_ENGINES_DIR=/cache/tensorrt NVIDIA_DRIVER_CAPABILITIES=compute,utility
VOLUME /cache
USER 10001:10001

FROM base
COPY --from=build /opt/iddpm /opt/iddpm
