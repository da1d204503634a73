-- What the guard decides of a call to the GCS before anything else: who speaks, in one
-- header that nobody else can set. Refusals are gRPC errors with a reason.

local SYNC = "/ray.rpc.syncer.RaySyncer/StartSync"
local ADD_JOB = "/ray.rpc.JobInfoGcsService/AddJob"
local NEXT_JOB = "/ray.rpc.JobInfoGcsService/GetNextJobID"
local MARKS = {"x-rsb-uri", "x-rsb-role", "x-rsb-who", "x-rsb-to", "x-rsb-seen", "x-rsb-limited"}
-- What reads many bytes must not hold up what keeps the cluster alive.
local TO = {head = "gcs-trusted", node = "gcs-trusted"}

function envoy_on_request(handle)
  local headers = handle:headers()
  for _, mark in ipairs(MARKS) do headers:remove(mark) end
  local uri, role, who = identity(handle)
  if uri == nil then return refuse(handle, role) end
  headers:add("x-rsb-uri", uri)
  headers:add("x-rsb-role", role)
  if role == "worker" then who = uri end
  -- A node's limits are for each address: its certificate, taken elsewhere, uses up
  -- none of its own before it is refused.
  if TO[role] ~= nil or role == "worker" then
    local from = handle:streamInfo():downstreamDirectRemoteAddress()
    who = who .. "@" .. string.gsub(from, ":%d+$", "")
  end
  headers:add("x-rsb-who", who)
  headers:add("x-rsb-to", TO[role] or "gcs-users")
  handle:streamInfo():dynamicMetadata():set("rsb", "uri", uri)

  -- Raylet's syncer sends the token twice and HTTP/2 folds the copies into one
  -- value, which the GCS refuses. Equal copies are one; others are an attempt.
  local token = headers:get("authorization")
  if token ~= nil and string.find(token, ",", 1, true) then
    local first = string.match(token, "^([^,]*)")
    for part in string.gmatch(token, "[^,]+") do
      if part ~= first then return refuse(handle, "two different tokens") end
    end
    headers:replace("authorization", first)
  end

  -- The GCS aborts on a sync stream without node_id, before it sees the token.
  local path = headers:get(":path")
  if path == SYNC then
    local node = headers:get("node_id")
    if node == nil or #node ~= 56 or string.find(node, "[^0-9a-f]") then
      return refuse(handle, "StartSync without a node_id")
    end
  elseif path == NEXT_JOB then
    handle:streamInfo():dynamicMetadata():set("rsb", "next_job", uri)
  elseif path == ADD_JOB then
    handle:streamInfo():dynamicMetadata():set("rsb", "add_job", headers:get("x-request-id"))
  end
  handle:clearRouteCache()
  checked(handle)
end

-- A new job belongs to whom the GCS gave its number, and has begun when the GCS
-- says so: told to the access service before the answer goes out, so that the
-- job's next call is already known.
local function tell(handle, path, header, value, body)
  if not agreed(handle, path, {[header] = value}, body) then
    handle:headers():replace("grpc-status", "14")
  end
end

function envoy_on_response(handle)
  local meta = handle:streamInfo():dynamicMetadata():get("rsb")
  if meta == nil then return end
  if meta["next_job"] ~= nil then
    local body = handle:body()
    if body == nil or body:length() < 5 then return end
    tell(handle, "/job", "x-rsb-uri", meta["next_job"], body:getBytes(0, body:length()))
  elseif meta["add_job"] ~= nil and handle:headers():get("grpc-status") == nil then
    tell(handle, "/added", "x-request-id", meta["add_job"], "")
  end
end
