# Three images of one file, by target: `pipelines` (no torch: collector, retention, Evidently's pages, controllers, the CLI), `serve` (transformer,
# predictor, roll-out server; no Ray) and `train` (the pipelines' components, and the nodes of a Ray cluster). See docs/images.md.
#
#   docker build --target serve --tag REGISTRY/onerec-serve:VERSION .
#
# BASE         pin it by digest where you build: --build-arg BASE=docker.io/library/python@sha256:...
# TORCH_INDEX  where torch comes from: the CPU build, for trials. PyPI (https://pypi.org/simple) holds the CUDA build.
ARG BASE=docker.io/library/python:3.11.14-slim-bookworm

# What every image runs on: an interpreter and a user without rights. Nothing is written outside /tmp and /data.
FROM ${BASE} AS runtime
ARG BASE
RUN groupadd --gid 10001 onerec \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin onerec \
 && install --directory --owner 10001 --group 10001 /data
ENV PATH=/opt/app/bin:/opt/onerec/bin:$PATH \
    HOME=/tmp \
    ONEREC_HOME=/data \
    OMP_WAIT_POLICY=PASSIVE \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0
WORKDIR /opt/app
LABEL org.opencontainers.image.source="https://github.com/onerec-platform/onerec-platform" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="${BASE}"

# What each extra of the project asks for, as pip reads it; other changes of pyproject.toml leave the layers of packages alone.
FROM runtime AS requirements
WORKDIR /requirements
COPY pyproject.toml ./
RUN python3 -c "import pathlib, tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    [pathlib.Path(name + '.txt').write_text('\n'.join(project['dependencies'] + extra)) for name, extra in project['optional-dependencies'].items()]" \
 && rm pyproject.toml

# Packages go to /opt/onerec, this project to /opt/app, so that a change of code costs a layer of some megabytes. The tools that
# install them, build the project's wheel and write the bill of materials reach no image. Only wheels are taken from the index, so
# that no stage needs a compiler; kfp-server-api, which is pure Python, has none.
FROM runtime AS builder
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    INSTALL="/opt/tools/bin/pip --quiet --python /opt/onerec/bin/python install --only-binary :all: --no-binary kfp-server-api --constraint constraints.txt" \
    BILL="/opt/tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file /sbom.cdx.json /opt/onerec/bin/python"
WORKDIR /source
COPY constraints.txt ./
RUN --mount=type=cache,target=/tmp/.cache/pip python3 -m venv /opt/tools \
 && /opt/tools/bin/pip install --quiet --upgrade pip 'setuptools>=77' wheel \
 && /opt/tools/bin/pip install --quiet --only-binary :all: --constraint constraints.txt cyclonedx-bom \
 && python3 -m venv --without-pip /opt/onerec \
 && echo /opt/app > /opt/onerec/lib/python3.11/site-packages/onerec.pth

FROM builder AS project
COPY . .
RUN touch README.md \
 && /opt/tools/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /wheel . \
 && $INSTALL --no-deps --target /opt/app /wheel/*.whl

FROM builder AS pipelines-packages
COPY --from=requirements /requirements/pipelines.txt /requirements/intake.txt /requirements/monitoring.txt /requirements/
RUN --mount=type=cache,target=/tmp/.cache/pip $INSTALL -r /requirements/pipelines.txt -r /requirements/intake.txt -r /requirements/monitoring.txt

FROM pipelines-packages AS pipelines-bill
COPY pyproject.toml ./
RUN $BILL

FROM builder AS serve-packages
COPY --from=requirements /requirements/serve.txt /requirements/
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/tmp/.cache/pip $INSTALL --no-deps --index-url "$TORCH_INDEX" torch \
 && $INSTALL -r /requirements/serve.txt

FROM serve-packages AS serve-bill
COPY pyproject.toml ./
RUN $BILL

FROM builder AS train-packages
COPY --from=requirements /requirements/train.txt /requirements/cluster.txt /requirements/intake.txt /requirements/monitoring.txt /requirements/
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/tmp/.cache/pip $INSTALL --no-deps --index-url "$TORCH_INDEX" torch \
 && $INSTALL -r /requirements/train.txt -r /requirements/cluster.txt -r /requirements/intake.txt -r /requirements/monitoring.txt

FROM train-packages AS train-bill
COPY pyproject.toml ./
RUN $BILL

FROM runtime AS pipelines
COPY --from=pipelines-packages /opt/onerec /opt/onerec
COPY --from=pipelines-bill /sbom.cdx.json /opt/sbom.cdx.json
COPY --from=project /opt/app /opt/app
USER 10001:10001
EXPOSE 8000
ENTRYPOINT ["python", "-m", "pipelines"]
ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="onerec-pipelines" \
      org.opencontainers.image.description="OneRec without torch: event collector, retention, drift pages, controllers and the onerec command" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

FROM runtime AS serve
COPY --from=serve-packages /opt/onerec /opt/onerec
COPY --from=serve-bill /sbom.cdx.json /opt/sbom.cdx.json
COPY --from=project /opt/app /opt/app
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
EXPOSE 8080 8081
ENTRYPOINT ["python", "-m", "models.serving"]
ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="onerec-serve" \
      org.opencontainers.image.description="OneRec's model servers: transformer, predictor and roll-outs over the Open Inference Protocol" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

FROM runtime AS train
COPY --from=train-packages /opt/onerec /opt/onerec
COPY --from=train-bill /sbom.cdx.json /opt/sbom.cdx.json
COPY --from=project /opt/app /opt/app
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
CMD ["python", "-m", "ray.scripts.scripts", "--version"]
ARG VERSION=0.0.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="onerec-train" \
      org.opencontainers.image.description="OneRec's pipeline components and training on Ray" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
