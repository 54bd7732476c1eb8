# harp-batch with everything it needs: `docker build .` for CPUs, `docker build --build-arg TORCH_INDEX= .` for CUDA.
#
# The base is pinned by version. A digest pins more; it could not be looked up where this file was written:
#   docker buildx imagetools inspect python:3.11.14-slim-bookworm   # then append its @sha256:...
#
# What changes seldom comes first. torch is installed anew only when its own pin changes, the other dependencies when
# theirs do, and a change of the code touches the last, small layer alone.
ARG PYTHON=python:3.11.14-slim-bookworm

# The pins as files of their own: a layer that copies one is kept as long as that file's content is the same.
FROM ${PYTHON} AS pins
WORKDIR /pins
COPY constraints.txt pyproject.toml docker/requirements.py ./
RUN grep '^torch==' constraints.txt > torch.txt \
 && python requirements.py > requirements.txt

FROM ${PYTHON} AS dependencies
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/harp-batch
ENV PATH=/opt/harp-batch/bin:$PATH
WORKDIR /pins
COPY --from=pins /pins/torch.txt ./
# Empty: the package index's own torch, which is built for CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} -r torch.txt
COPY --from=pins /pins/requirements.txt /pins/constraints.txt ./
RUN pip install -c constraints.txt -r requirements.txt

FROM ${PYTHON} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY db db
COPY harp_batch harp_batch
RUN pip wheel --disable-pip-version-check --no-cache-dir --no-deps --wheel-dir /wheel .

FROM ${PYTHON}
# Compose may run it as another user, with no name and no home: HOME is the container's tmpfs, and /cache, which becomes
# a volume, is open to all.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /tmp harp \
 && install --directory --mode=1777 /cache \
 && install --directory /data /app/jobs
COPY --from=dependencies /opt/harp-batch /opt/harp-batch
ENV PATH=/opt/harp-batch/bin:$PATH HOME=/tmp LOGNAME=harp PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/cache
COPY --chmod=0755 docker/on-cluster.sh /usr/local/bin/on-cluster
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    pip install --disable-pip-version-check --no-cache-dir --no-deps --no-index /wheel/*.whl
WORKDIR /app
USER 10001:10001
CMD ["harp-batch", "--help"]
