# docker build -t jaxserve --build-arg EXTRA=cuda13 .
# docker run --gpus all -p 8000:8000 -v ~/.cache/huggingface:/home/jaxserve/.cache/huggingface jaxserve Qwen/Qwen2.5-3B-Instruct
FROM python:3.12-slim
ARG EXTRA=demo
RUN useradd --create-home jaxserve
WORKDIR /opt/jaxserve
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY jaxserve jaxserve
COPY kernels_pallas kernels_pallas
RUN pip install --no-cache-dir -c constraints.txt ".[${EXTRA}]"
USER jaxserve
EXPOSE 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["jaxserve", "serve"]
