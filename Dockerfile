# The orchestrator: Prefect's server and worker, MLflow, DVC and the checkout. No torch; see Dockerfile.train for that.
#   docker build --tag phantom-orchestrator:0.2.0 .
FROM python:3.11.14-slim-bookworm AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /build
# The dependencies before the code, so that a change of code does not install them again.
COPY requirements/orchestrator.txt ./
RUN pip install --no-deps --require-hashes --requirement orchestrator.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-deps --no-build-isolation .

FROM python:3.11.14-slim-bookworm
RUN groupadd --gid 1000 phantom && useradd --uid 1000 --gid 1000 --create-home phantom
COPY --from=build /opt/venv /opt/venv
# What flows run from, and lay into the checkout on the volume. params.yaml is not among it: each run makes its own.
WORKDIR /opt/phantom
COPY pyproject.toml constraints.txt dvc.yaml prefect.yaml prefect.toml .dvcignore ./
COPY .dvc/config .dvc/config
COPY flows flows
COPY src src
COPY models/mini models/mini
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    DO_NOT_TRACK=1 DVC_NO_ANALYTICS=1 MLFLOW_DISABLE_TELEMETRY=true PREFECT_SERVER_ANALYTICS_ENABLED=false
# What MLflow's runs name as their code: --build-arg COMMIT="$(git rev-parse HEAD)"
ARG COMMIT=unknown
ENV PHANTOM_COMMIT=$COMMIT
USER 1000:1000
CMD ["phantom", "--help"]
