# The service with the bundled model, for CPUs, for this machine only and without keys (docs/security.md):
#   docker build -t iddpm . && docker run -e IDDPM_ALLOW_KEYLESS=true -p 127.0.0.1:8000:8000 iddpm
# With keys: docker run -e IDDPM_KEYS_FILE=/keys/keys.json -v "$PWD/deploy/keys:/keys:ro" ...
# Only loopback names are accepted in the Host header; for others: docker run -e IDDPM_ALLOWED_HOSTS=name,name ...
# It serves artifacts (iddpm export) and has no torch; EXTRA=torch serves plain checkpoints too, and where a plain
# `pip install torch` brings CUDA packages (gigabytes), name an index with CPU wheels:
#   docker build --build-arg EXTRA=torch --build-arg PIP_EXTRA_INDEX_URL=... -t iddpm .

FROM python:3.11-slim AS build
ARG PIP_EXTRA_INDEX_URL
ARG EXTRA=
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The environment that is copied below has no pip: the one of the base image installs into it.
RUN python -m venv --without-pip /opt/iddpm
WORKDIR /src
# Dependencies first, in a layer that survives every change of our own code.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip --python /opt/iddpm/bin/python install -c constraints.txt ".${EXTRA:+[$EXTRA]}"
COPY cli cli
COPY diffusion diffusion
COPY formats formats
COPY interchange interchange
COPY trainer trainer
COPY model_export model_export
COPY service service
# Headers and test programs of torch (145 MB) serve compilers, and there is none.
RUN pip --python /opt/iddpm/bin/python install --no-deps --force-reinstall . \
    && rm -rf /opt/iddpm/lib/python3.*/site-packages/torch/include /opt/iddpm/lib/python3.*/site-packages/torch/test

FROM python:3.11-slim
RUN useradd --system --uid 10001 --no-create-home iddpm
COPY --from=build /opt/iddpm /opt/iddpm
# Owned by who serves it, so that a checkout with a strict umask works too.
COPY --chown=10001:10001 models/fashion32 /models/fashion32
ENV PATH=/opt/iddpm/bin:$PATH PYTHONUNBUFFERED=1 HOME=/tmp
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# Alive, not ready: a start-up or a drain is no reason to restart. http.client, because urllib would ask a proxy.
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=3 CMD ["python", "-c", \
    "import http.client as h; c = h.HTTPConnection('127.0.0.1', 8000, timeout=4); c.request('GET', '/healthz'); \
    raise SystemExit(c.getresponse().status != 200)"]
ENTRYPOINT ["iddpm"]
CMD ["serve", "--model", "/models/fashion32", "--host", "0.0.0.0", "--port", "8000"]
