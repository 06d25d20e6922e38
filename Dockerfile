# The light half of mlkit: it serves, and holds no torch.
#
#     docker build -t mlkit .
#     docker run -p 8000:8000 -v ./models:/srv/models:ro mlkit [MODEL…] [--set …]
#
# Nobody has built it yet: there was no Docker where it was written. tests/test_docker.py installs by the line below in a clean environment,
# weighs the result, and serves with it.
FROM python:3.12-slim

RUN useradd --uid 10001 --create-home mlkit && mkdir -p /srv/models
COPY setup.py pyproject.toml README.md LICENSE /src/
COPY mlkit /src/mlkit
RUN pip install --no-cache-dir "/src[openvino]" && rm -r /src

USER mlkit
WORKDIR /srv
ENV MLKIT_PATHS__MODELS=/srv/models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/ready', timeout=2)"]
# SIGTERM, the default: it says that it is not ready, answers what it accepted, and ends within 20 s
STOPSIGNAL SIGTERM
ENTRYPOINT ["mlkit", "serve", "--host", "0.0.0.0"]
