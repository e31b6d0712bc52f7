# One image for all nodes of a cluster: head, workers, jobs, MLflow. It holds the software alone; weights and data come
# from the shared storage or are fetched there. On x86-64 PyTorch's wheels carry CUDA and run without a GPU as well.
#
#   docker build --tag registry.example.org/segvit:0.1.0 .

# The Python of cluster.yaml: Ray refuses nodes whose version differs.
ARG PYTHON_IMAGE=python:3.11.18-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
WORKDIR /src
# First what changes seldom: a change of the code alone installs nothing anew.
COPY pyproject.toml constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt setuptools \
    && python -c 'import tomllib; print(*(project := tomllib.load(open("pyproject.toml", "rb"))["project"])["dependencies"], *project["optional-dependencies"]["export"], *project["optional-dependencies"]["s3"], sep="\n")' > requirements.txt \
    && pip install --no-cache-dir --prefix /install --constraint constraints.txt --requirement requirements.txt
COPY README.md LICENSE ./
COPY segvit segvit
COPY pipeline pipeline
COPY flows flows
RUN pip install --no-cache-dir --prefix /install --no-deps --no-build-isolation .

FROM ${PYTHON_IMAGE}
# The operator's probes of older releases ask with wget; OpenCV and simplejpeg need no library of the system.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 segvit \
    && useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash segvit
# Below /usr/local, where login shells look as well, which the operator may start.
COPY --from=build /install /usr/local
ENV PYTHONUNBUFFERED=1 RAY_USAGE_STATS_ENABLED=0
# By number: Kubernetes can see that it is not root.
USER 1000:1000
WORKDIR /home/segvit
CMD ["segvit", "--help"]
