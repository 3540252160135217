# The stage scripts in a container, on GPUs or, without --gpus, on the CPU:
#   docker build -t llava_kd .
#   docker run --rm --gpus all --ipc=host -v "$PWD/data:/llava_kd/data" -v "$PWD/runs:/llava_kd/runs" llava_kd bash scripts/stage1_dpt.sh
# --ipc=host: data workers and NCCL hand tensors over in shared memory. Runs and data are mounted, never in the image.
FROM python:3.11-slim-bookworm

# gcc: the exact resize in C, Triton's and DeepSpeed's kernels at their first start. git: the commit in run.json.
# Unpinned: Debian removes a version when the next one is out.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libc6-dev git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /llava_kd
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
RUN python -m venv "$VIRTUAL_ENV"
COPY . .
RUN pip install -c constraints.txt -e '.[all]'

CMD ["llava-kd", "env"]
