-- Who speaks to the dashboard's front, and whose the submitted job is that it ends. What
-- each role may do there at all, its RBAC says.

local ID = "[%w_.-]+"

local function submission(method, path)
  if method == "POST" then return string.match(path, "^/api/jobs/(" .. ID .. ")/stop$") end
  if method == "DELETE" then return string.match(path, "^/api/jobs/(" .. ID .. ")$") end
end

local function may(handle, uri)
  local method = handle:headers():get(":method")
  local path = string.match(handle:headers():get(":path"), "^[^?]*")
  if method == "POST" and path == "/api/jobs/" then
    handle:streamInfo():dynamicMetadata():set("rsb", "submits", uri)
  elseif method == "DELETE" or (method == "POST" and string.find(path, "/stop$")) then
    local id = submission(method, path)
    return id ~= nil and agreed(handle, "/may-end", {["x-rsb-uri"] = uri, ["x-rsb-job"] = id})
  end
  return true
end

function envoy_on_request(handle)
  local uri, role = identity(handle)
  if uri == nil then return refuse(handle, role) end
  if role == "driver" and not may(handle, uri) then
    return refuse(handle, "a submitted job is ended by who submitted it here, or by an operator")
  end
  checked(handle)
end

-- Whose it is, the access service knows before its submitter does. If it does not, only
-- an operator ends it.
function envoy_on_response(handle)
  local meta = handle:streamInfo():dynamicMetadata():get("rsb")
  if meta == nil or meta["submits"] == nil or handle:headers():get(":status") ~= "200" then return end
  local body = handle:body()
  if body == nil then return end
  local id = string.match(body:getBytes(0, body:length()), '"submission_id": *"(' .. ID .. ')"')
  if id ~= nil then
    agreed(handle, "/submitted", {["x-rsb-uri"] = meta["submits"], ["x-rsb-job"] = id})
  end
end
