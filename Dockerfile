# docker build -t clap2diffusion .
# docker run --gpus all --shm-size=8g -v "$PWD/data:/app/data" -v "$PWD/runs:/app/runs" -v "$PWD/cache:/app/cache" \
#     -v "$HOME/.cache/huggingface:/hf" clap2diffusion configs/sd15.json --data-root data/mine
FROM python:3.11-slim
WORKDIR /app
ENV HF_HOME=/hf PYTHONUNBUFFERED=1
RUN apt-get update && apt-get install -y --no-install-recommends git g++ && rm -rf /var/lib/apt/lists/*
COPY requirements.txt .
RUN pip install --no-cache-dir torch==2.13.0 && pip install --no-cache-dir -r requirements.txt
COPY . .
ENTRYPOINT ["bash", "run_all_stages.sh"]
