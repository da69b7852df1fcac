# JupyterLab on the chapters, in a container:
#   docker build -t pairdiff .                            with the build of PyTorch for NVIDIA GPUs; run it with --gpus all
#   docker build -t pairdiff --build-arg TORCH_INDEX=URL . with the CPU build, 2 GB smaller; README.md says where the URL is
#   docker run --rm -p 8888:8888 pairdiff
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /pairdiff
COPY . .
ARG TORCH_INDEX=
# .devcontainer uses this environment, too: there, set-up installs only the checkout, which is mounted elsewhere.
RUN PIP_EXTRA_INDEX_URL="$TORCH_INDEX" make setup
EXPOSE 8888
CMD ["make", "lab", "LAB=--ip=0.0.0.0 --allow-root --no-browser"]
