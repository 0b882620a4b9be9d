/**
 * The OCP plugin of OpenClaw: the command /ocp, the provider "ocp", and a service that keeps the
 * proxy running.
 *
 * OpenClaw calls register() several times, also within its own commands, so it only registers;
 * the work begins with the service's start().
 */
import { createClient } from "./lib/client.js";
import { answer } from "./lib/commands.js";
import { createProvider } from "./lib/login.js";
import { createRestart, createSupervisor } from "./lib/service.js";
import { readSettings, surroundings } from "./lib/settings.js";

/** Return the plugin's settings, read again each time because a file may have changed. */
function settingsOf(api) {
  return readSettings(api.pluginConfig ?? {}, surroundings());
}

function registerCommand(api, restart) {
  api.registerCommand({
    name: "ocp",
    description: "Usage, health, models, logs and keys of the OCP proxy",
    acceptsArgs: true,
    requireAuth: true,
    handler: async (ctx) => ({ text: await answer(ctx, () => {
      const settings = settingsOf(api);
      return { settings, client: createClient(settings), restart };
    }) }),
  });
}

export default {
  id: "ocp",
  name: "OCP",
  description: "The local OCP proxy in chats, as a provider, and as a service",
  register(api) {
    let supervisor = null;
    api.registerService({
      id: "ocp-proxy",
      async start(ctx) {
        await supervisor?.stop();
        supervisor = createSupervisor(settingsOf(api), ctx.logger, ctx.serviceHealth);
        supervisor.start();
      },
      async stop() {
        const stopping = supervisor;
        supervisor = null;
        await stopping?.stop();
      },
    });
    registerCommand(api, createRestart(() => settingsOf(api), () => supervisor));
    api.registerProvider(createProvider(() => settingsOf(api)));
  },
};
