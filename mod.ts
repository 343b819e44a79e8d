/**
 * The hosts of a training cluster, from one YAML inventory: which there are, which is the coordinator, which answer,
 * from which URLs data can be pulled, and what a command says on each of them.
 *
 * @example Who answers?
 * ```ts
 * import { discoverReachableNodes } from "@ringrift/cluster-hosts";
 *
 * for (const { node, status, address } of await discoverReachableNodes({ source: "config/demo_hosts.yaml" })) {
 *   console.log(`${node.name} at ${address}: version ${status.version}`);
 * }
 * ```
 *
 * @module
 */
export {
  checkHttpEndpoint,
  checkNodeReachable,
  ClusterNode,
  DATA_SYNC_PORT,
  dataEndpoints,
  DEFAULT_CONFIG_PATH,
  DEFAULTS,
  didYouMean,
  discoverReachableNodes,
  ELO_SYNC_PORT,
  endpointUrl,
  findSshEndpoint,
  foldNames,
  formatConfigProblem,
  getActiveNodes,
  getClusterNodes,
  getCoordinatorAddress,
  getCoordinatorNode,
  getDataSyncUrls,
  getEloSyncConfig,
  getEloSyncUrls,
  getSyncUrls,
  hostPort,
  HostsConfigError,
  loadHostsConfig,
  missingNetFlag,
  MODEL_SYNC_PORT,
  netFlag,
  parseHostsConfig,
  probeNode,
  probeNodes,
  racedSshEndpoints,
  readHostsConfig,
  readsUnifiedConfig,
  readVariable,
  runOnNodes,
  selectNodes,
  spawnSsh,
  sshCommand,
  sshEndpoints,
  statusPath,
  unsupportedDeno,
  validateHostsConfig,
  waitForNodes,
  watchNodes,
} from "./cluster_hosts.ts";
export type {
  ClusterNodeFields,
  CommandFailureCode,
  CommandResult,
  ConfigProblem,
  ConfigSource,
  CoordinatorAddress,
  DataSyncUrlOptions,
  DiscoverOptions,
  EloSyncConfig,
  Endpoint,
  FailureCode,
  HostEntry,
  HostsConfig,
  HostsConfigText,
  LoadOptions,
  NodeProbe,
  NodeSelection,
  NodeState,
  ProbeFailure,
  ProbeOptions,
  ReachableNode,
  RunOptions,
  SshOptions,
  StatusDocument,
  SweepOptions,
  SyncUrlOptions,
  WaitOptions,
  WatchOptions,
} from "./cluster_hosts.ts";
