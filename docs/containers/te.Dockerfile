# Leviathan with Transformer Engine, from the repository's root:
#   docker build -f docs/containers/te.Dockerfile -t leviathan .
#   docker run --rm --gpus all --ipc host leviathan doctor
# CUDA, cuDNN and NCCL come with torch's wheels; of the host the image needs the driver alone. Not built yet.
FROM python:3.12-bookworm

ENV PIP_NO_CACHE_DIR=1 PYTHONSAFEPATH=1
WORKDIR /opt/leviathan
COPY docs/containers/constraints.txt constraints.txt
RUN pip install -c constraints.txt torch setuptools wheel packaging ninja pybind11

# headers from the wheels, without NCCL's expert parallelism, which wants a newer NCCL than torch brings
ARG MAX_JOBS=8
RUN NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_WITH_NCCL_EP=0 MAX_JOBS=${MAX_JOBS} \
    pip install --no-build-isolation -c constraints.txt "transformer-engine[pytorch]"

COPY . .
RUN pip install -c docs/containers/constraints.txt .
WORKDIR /work
ENTRYPOINT ["leviathan"]
