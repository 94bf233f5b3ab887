# Two stages: one that builds, and one that holds the installed wheel and its locked dependencies. See docs/container.md.

# Any Debian with Python 3.11 or newer, its venv and ca-certificates; name it by digest where builds must repeat.
ARG BASE=docker.io/library/python:3.13-slim-bookworm

FROM ${BASE} AS build
WORKDIR /build
# When set, compiled files are checked by content in place of time, and the files of the wheel get this time.
ARG SOURCE_DATE_EPOCH
RUN python3 -m venv tools \
 && python3 -m venv --without-pip /opt/outbox-relay
COPY requirements/build.txt requirements/daemon.txt requirements/
# Both secrets are optional: where the packages come from, and whom that index is certified by.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=ca.crt \
    tools/bin/pip install --no-cache-dir --only-binary :all: --require-hashes -r requirements/build.txt \
 && tools/bin/pip --python /opt/outbox-relay/bin/python \
    install --no-cache-dir --only-binary :all: --require-hashes -r requirements/daemon.txt
COPY pyproject.toml README.md LICENSE ./
COPY migrations migrations
COPY outbox_relay outbox_relay
RUN tools/bin/python -m hatchling build --target wheel --directory dist \
 && tools/bin/pip --python /opt/outbox-relay/bin/python install --no-index --no-deps dist/*.whl

FROM ${BASE}
# What a relay never needs but an intruder may: pip wherever the base keeps it, and the right to become another user.
RUN find / -xdev \( -path '*/bin/pip*' -o -path '*-packages/pip' -o -path '*-packages/pip-*' \
       -o -name ensurepip -o -name python-wheels \) -prune -exec rm -r {} + \
 && find / -xdev -type f -perm /6000 -exec chmod a-s {} +
COPY --from=build /opt/outbox-relay /opt/outbox-relay
# SSL_CERT_FILE is for libpq, of which psycopg brings its own: sslrootcert=system finds no authority without it.
ENV PATH=/opt/outbox-relay/bin:/usr/local/bin:/usr/bin:/bin \
    SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
    OUTBOX_RELAY_METRICS_PORT=9464
EXPOSE 9464
# A number, so that Kubernetes can tell that it is not root; any other will do as well.
USER 65532:65532
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=30s CMD ["outbox-relay", "health"]
ENTRYPOINT ["outbox-relay"]
CMD ["run"]

ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="outbox-relay" \
      org.opencontainers.image.description="Transactional outbox relay from PostgreSQL to Kafka" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.source="https://github.com/outbox-relay/outbox-relay" \
      org.opencontainers.image.documentation="https://github.com/outbox-relay/outbox-relay/blob/main/docs/container.md" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
