/** Asks the proxy over HTTP. Errors are ProxyErrors, whose message is Markdown for the user. */
import { code } from "./format.js";

const REQUEST_TIMEOUT_MS = 15_000;

export class ProxyError extends Error {
  constructor(message, status = null) {
    super(message);
    this.status = status;
  }
}

function messageOf(body, status) {
  const errors = Array.isArray(body?.errors) ? body.errors.join("; ") : null;
  const said = body?.error?.message ?? errors;
  return said ? `The proxy says: ${code(said, 400)}` : `The proxy answered ${status}.`;
}

function keyAdvice(settings) {
  return settings.adminKey
    ? "The proxy does not accept this admin key. Compare the plugin's adminKey, or the file that "
      + "it reads, with `~/.ocp/admin-key` on the proxy's machine."
    : "The proxy wants its admin key. Set it on OpenClaw's machine: "
      + "`openclaw config set plugins.entries.ocp.config.adminKey KEY`";
}

function parsed(text, url, status) {
  try {
    return JSON.parse(text);
  } catch {
    throw new ProxyError(`What answers at ${code(url, 200)} is not an OCP proxy: it answered `
      + `${status} without JSON.`, status);
  }
}

/**
 * Return a client for the proxy of these settings. Each call resolves to the answer's JSON.
 *
 * key   sent instead of the admin key; null for none
 */
export function createClient(settings, key = settings.adminKey, fetch = globalThis.fetch) {
  async function call(method, path, body) {
    const headers = { accept: "application/json" };
    if (key) headers.authorization = `Bearer ${key}`;
    if (body !== undefined) headers["content-type"] = "application/json";
    let response, text;
    try {
      response = await fetch(settings.url + path, {
        method, headers, body: body === undefined ? undefined : JSON.stringify(body),
        redirect: "error", signal: AbortSignal.timeout(REQUEST_TIMEOUT_MS),
      });
      text = await response.text();
    } catch (error) {
      const reason = code(error.cause?.code ?? error.name, 40);
      throw new ProxyError(`No OCP proxy answers at ${code(settings.url, 200)} (${reason}).`);
    }
    const answer = parsed(text, settings.url, response.status);
    // Of several settings, 207 means that some were accepted, and 400 that none was.
    if (response.ok || answer?.results) return answer;
    if (response.status === 401 || response.status === 403) {
      throw new ProxyError(keyAdvice({ adminKey: key }), response.status);
    }
    throw new ProxyError(messageOf(answer, response.status), response.status);
  }

  return {
    get: (path) => call("GET", path),
    post: (path, body) => call("POST", path, body),
    patch: (path, body) => call("PATCH", path, body),
    delete: (path) => call("DELETE", path),
  };
}

/** Return whether this is what an OCP proxy answers at /health. Others may use its port. */
export function isOcpHealth(body) {
  return Boolean(body) && typeof body === "object"
    && "authMode" in body && "claudeBinaryOk" in body && "version" in body;
}
