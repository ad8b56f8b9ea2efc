# docker build -t fnlm .
# docker run --rm -p 8000:8000 -v "$PWD/runs:/app/runs" fnlm serve runs/NAME --host 0.0.0.0
#
# The image is meant for the CPU. For the small CPU build of torch name the index that PyTorch's install page gives for it:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=... -t fnlm .
# Without it, pip installs the CUDA build, which runs on a CPU as well but is several GB larger.
FROM python:3.11-slim

ARG PIP_EXTRA_INDEX_URL=""
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# What writes texts on a CPU is compiled at first use (docs/serving.md); without a compiler torch does it, more slowly.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /app
# Its own layer: the dependencies change more rarely than the source.
COPY constraints.txt ./
RUN pip install --no-cache-dir torch numpy -c constraints.txt
COPY pyproject.toml README.md LICENSE ./
COPY fnlm ./fnlm
COPY cli ./cli
COPY webui ./webui
RUN pip install --no-cache-dir . -c constraints.txt \
    && useradd --system --uid 1000 fnlm \
    && install -d -o fnlm runs data

USER fnlm
EXPOSE 8000
ENTRYPOINT ["fnlm"]
CMD ["--help"]
