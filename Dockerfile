# One image for every node of a cluster: head, workers, jobs, MLflow. It holds the software alone; data, weights and
# secrets come from outside. On x86-64 PyTorch's wheels carry CUDA, and run without a GPU as well.
#
#   docker build --tag registry.example.org/segvit:0.1.0 .

# The Python of cluster.yaml: Ray refuses nodes whose version differs.
ARG PYTHON_IMAGE=python:3.11.18-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
RUN pip install --no-cache-dir uv==0.13.9
# First what the project needs, then the project: a change of the code makes a small layer and installs nothing anew.
COPY pyproject.toml constraints.txt ./
RUN uv pip install --no-cache --prefix /requirements --requirement pyproject.toml --extra export --extra s3 \
    --constraint constraints.txt
COPY README.md LICENSE ./
COPY segvit segvit
COPY pipeline pipeline
COPY flows flows
RUN uv pip install --no-cache --prefix /project --no-deps --build-constraint constraints.txt .

FROM ${PYTHON_IMAGE}
# KubeRay's operator asks with wget whether Ray is well, in its releases before 1.6.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 segvit \
    && useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash segvit
# Below /usr/local, which is in the PATH of login shells too; an operator may start one.
COPY --from=build /requirements /usr/local
COPY --from=build /project /usr/local
ENV PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
# By number, so that Kubernetes can tell that it is not root.
USER 1000:1000
WORKDIR /home/segvit
CMD ["segvit", "--help"]
