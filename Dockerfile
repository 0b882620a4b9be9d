# OCP with the claude program, for docker, podman and whatever else builds images. compose.yaml
# beside this file runs it; docs/install.md says how to log in.

FROM node:22.20.0-bookworm-slim

# Debian's python3 and certificates get security fixes under the same name, so no version is named.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/*

# The version of the claude program that the tests of this repository ran against.
ARG CLAUDE_VERSION=2.1.329
RUN npm install --global --no-audit --no-fund "@anthropic-ai/claude-code@${CLAUDE_VERSION}" \
    && npm cache clean --force \
    && claude --version

# Two volumes: the login of claude, and the state of OCP. A new volume gets these modes.
RUN mkdir --mode=0700 /login /data && chown node:node /login /data

COPY . /opt/ocp/
RUN chmod -R a+rX /opt/ocp

# In the container the server has to listen on all addresses. What of that is reachable, compose
# or `docker run --publish` decides; a key is asked for in any case.
ENV CLAUDE_BIND=0.0.0.0 \
    CLAUDE_PROXY_PORT=3456 \
    CLAUDE_AUTH_MODE=shared \
    CLAUDE_CONFIG_DIR=/login \
    OCP_HOME=/data \
    OCP_PUBLIC_URL=none \
    DISABLE_AUTOUPDATER=1

USER 1000
WORKDIR /data
VOLUME ["/login", "/data"]
EXPOSE 3456

HEALTHCHECK --interval=30s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python3", "-I", "-c", "import http.client, os, sys; server = http.client.HTTPConnection('127.0.0.1', int(os.environ['CLAUDE_PROXY_PORT']), timeout=4); server.request('GET', '/health'); sys.exit(server.getresponse().status != 200)"]

ENTRYPOINT ["python3", "/opt/ocp/ocp_server.py"]
