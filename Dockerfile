# Hone's two images: `docker build --target service .` and `docker build --target trainer .` (buildah and podman take the same
# file). CUDA comes with torch's own wheels, so any slim Python 3.11 of Debian will do as a base.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

# --- Hone itself, as files to lay over an environment that has its dependencies ------------------------------------
FROM ${BASE_IMAGE} AS hone
COPY requirements-bootstrap.lock /src/
RUN python3 -m venv /tools \
 && /tools/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r /src/requirements-bootstrap.lock \
 && python3 -m venv --without-pip /opt/hone
COPY pyproject.toml README.md LICENSE /src/
COPY service /src/service
COPY trainer_image /src/trainer_image
RUN cd /src && /tools/bin/python -m hatchling build -t wheel -d /dist \
 && /tools/bin/uv pip install --compile-bytecode --python /opt/hone/bin/python --no-deps /dist/*.whl \
 && mkdir /out && cd /opt/hone && cp -r --parents bin/hone lib/python3*/site-packages/hone* /out

# --- what both images are ------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS base
# A user without a name: any UID will do, and the root file system may be read-only. Whoever runs it gives HOME and TMPDIR
# a place to write; this HOME is for who does not. LOGNAME, because libraries ask for a name and a random UID has none.
ENV PATH=/opt/hone/bin:$PATH \
    HOME=/home/hone \
    LOGNAME=hone \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
RUN python3 -m venv --without-pip /opt/hone \
 && install -d -m 0775 -o 65532 -g 0 /home/hone
WORKDIR /home/hone

# --- the control plane and the command line: no torch --------------------------------------------------------------
FROM base AS service
COPY requirements-bootstrap.lock requirements-service.lock /opt/hone/
RUN python3 -m venv /tmp/tools \
 && /tmp/tools/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r /opt/hone/requirements-bootstrap.lock \
 && /tmp/tools/bin/uv pip sync --no-cache --compile-bytecode --python /opt/hone/bin/python \
      --require-hashes /opt/hone/requirements-service.lock \
 && rm -r /tmp/tools
COPY --from=hone /out /opt/hone
USER 65532:0
EXPOSE 7465
ENTRYPOINT ["hone"]
CMD ["serve"]
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Hone service" \
      org.opencontainers.image.description="Control plane and command line of Hone, a fine-tuning service for GPU clusters" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# --- what a training pod runs --------------------------------------------------------------------------------------
FROM base AS trainer
# For what is compiled while training: DeepSpeed's extensions and Triton's launchers.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/log/apt /var/log/dpkg.log
COPY requirements-bootstrap.lock requirements-trainer.lock /opt/hone/
# What is removed at the end is opened by nothing that trains: profilers, static libraries, a second nvrtc, a solver over
# several GPUs of one process, bitsandbytes for other CUDA releases than torch's and for AMD, Arrow's network server,
# the symbols of Triton's compiler (280 MB of its 460).
RUN python3 -m venv /tmp/tools \
 && /tmp/tools/bin/pip install --no-cache-dir --require-hashes --only-binary :all: -r /opt/hone/requirements-bootstrap.lock \
 && /tmp/tools/bin/uv pip sync --no-cache --compile-bytecode --python /opt/hone/bin/python \
      --require-hashes /opt/hone/requirements-trainer.lock \
 && rm -r /tmp/tools \
 && cd /opt/hone/lib/python3*/site-packages \
 && cuda=$(python -c "import torch; print(torch.version.cuda.replace('.', ''))") \
 && find bitsandbytes -name 'libbitsandbytes_*.so' ! -name "*_cuda$cuda.so" ! -name '*_cpu.so' -delete \
 && find nvidia triton -name '*.a' -delete \
 && rm -r nvidia/cu13/lib/libcusolverMg.so* nvidia/cu13/lib/libnvrtc.alt.so* nvidia/cu13/lib/libnvperf_*.so* \
      nvidia/nvshmem/lib/*.bc triton/backends/nvidia/lib/cupti triton/_C/libproton.so \
      pyarrow/libarrow_flight*.so* pyarrow/_flight*.so pyarrow/include pyarrow/tests pandas/tests \
 && strip --strip-unneeded triton/_C/libtriton.so
COPY --from=hone /out /opt/hone
USER 65532:0
ENTRYPOINT ["python", "-m", "hone_trainer"]
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Hone trainer" \
      org.opencontainers.image.description="What a training pod of Hone runs: TRL and PEFT under accelerate and DeepSpeed" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
