# JupyterLab on the chapters, in a container:
#   docker build -t pairdiff .                           for a processor
#   docker build -t pairdiff --build-arg DEVICE=cuda .   for NVIDIA GPUs; run it with --gpus all
#   docker run --rm -p 8888:8888 pairdiff
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
WORKDIR /pairdiff
COPY . .
ARG DEVICE=cpu
RUN if [ "$DEVICE" = cpu ]; then export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu; fi; make setup
EXPOSE 8888
CMD ["make", "lab", "LAB=--ip=0.0.0.0 --allow-root --no-browser"]
