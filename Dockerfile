# The image of `octavo-launcher`: the arguments are those of TGI's, and port 80 is the image's own.
#
#   docker build -t octavo .
#   docker run --gpus all -p 8080:80 -v $PWD/models:/models octavo --model-id /models/a-model
FROM rust:1-slim-bookworm AS build
RUN apt-get update && apt-get install --yes --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN python3 -m venv /build && /build/bin/pip install --no-cache-dir "maturin>=1.14,<2" && \
    /build/bin/maturin build --release --out /wheels

# Triton compiles its launchers with a C compiler when the first kernels run.
FROM python:3.12-slim-bookworm
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=build /wheels /wheels
RUN wheel=$(echo /wheels/*.whl) && pip install --no-cache-dir "$wheel[hub,uvloop]" && \
    useradd --uid 1000 --create-home octavo && mkdir /data && chown octavo /data
# Port 80 needs no root where the kernel's first unprivileged port is 0, as container engines set it.
USER octavo
ENV PORT=80 HF_HOME=/data TRITON_CACHE_DIR=/data/triton
VOLUME /data
EXPOSE 80
STOPSIGNAL SIGTERM
ENTRYPOINT ["octavo-launcher"]
