# docs/docker.md says how to build and run it; compose.yaml has the commands, compose.cpu.yaml the variant without a GPU.
FROM python:3.11-slim-bookworm
ENV PYTHONUNBUFFERED=1 PIP_ROOT_USER_ACTION=ignore
# torch.compile, which --compile asks for, compiles with g++
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /app
# what changes seldom comes first: torch is 3 GB with its CUDA libraries
ARG TORCH_INDEX=https://pypi.org/simple
RUN pip install --no-cache-dir torch==2.13.0 --index-url "$TORCH_INDEX"
COPY requirements.txt requirements-demo.txt ./
RUN pip install --no-cache-dir -r requirements.txt -r requirements-demo.txt
# whoever runs it owns what it writes into the mounted folders: give your own numbers, id -u and id -g
ARG UID=1000
ARG GID=1000
RUN groupadd --non-unique --gid "$GID" user \
    && useradd --no-log-init --non-unique --uid "$UID" --gid "$GID" --create-home user \
    && mkdir data runs cache /hf \
    && chown "$UID:$GID" . data runs cache /hf
COPY --chown=${UID}:${GID} . .
ENV HF_HOME=/hf
USER ${UID}:${GID}
ENTRYPOINT ["bash", "run_all_stages.sh"]
